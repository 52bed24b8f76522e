"""Muon for anybody's model, as a torch optimizer; the twin of `jax_impl/muon`."""

from torch_ref.muon.alias import Muon as Muon
from torch_ref.muon.batches import orthogonalize as orthogonalize
from torch_ref.muon.newton_schulz import CONVERGENT as CONVERGENT
from torch_ref.muon.newton_schulz import GRAM_RESTARTS as GRAM_RESTARTS
from torch_ref.muon.newton_schulz import KELLER_JORDAN as KELLER_JORDAN
from torch_ref.muon.newton_schulz import POLAR_EXPRESS as POLAR_EXPRESS
from torch_ref.muon.newton_schulz import POLAR_EXPRESS_DION as POLAR_EXPRESS_DION
from torch_ref.muon.newton_schulz import YOU as YOU
from torch_ref.muon.newton_schulz import Coefficients as Coefficients
from torch_ref.muon.newton_schulz import orthogonalize_via_newton_schulz as orthogonalize_via_newton_schulz
from torch_ref.muon.transforms import cautious_decayed_weights as cautious_decayed_weights
from torch_ref.muon.transforms import clip_qk as clip_qk
from torch_ref.muon.transforms import consistent_rms as consistent_rms
from torch_ref.muon.transforms import fan_ratio as fan_ratio
from torch_ref.muon.transforms import scale_by_momentum as scale_by_momentum
from torch_ref.muon.transforms import scale_by_neuron_norm as scale_by_neuron_norm
