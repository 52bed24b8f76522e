"""NNX ports of convolutional and patch models: channels last in JAX, channels first in torch."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from ._weights import array, linear, norm, put, sample, settle
from .port import Pair, Port

IMAGES = {"layouts": {"*": "NHWC->NCHW"}}


def images(*shape, seed=1):
    """A batch of images for torch and the options that hand it to JAX with its channels last."""
    x = sample(*shape, seed=seed)
    return (x,), {"jax_inputs": (x.transpose(0, 2, 3, 1).copy(),)}


def pads(n):
    """The same explicit padding on both sides of both axes."""
    return ((n, n), (n, n))


# --- convolution, batch norm, ReLU ---


class ConvBlock(nnx.Module):
    """Two strided convolutions with batch norm and ReLU; the second is dilated."""

    def __init__(self, cin, cmid, cout, *, rngs, bug=""):
        pad = "SAME" if bug == "same_padding" else pads(1)
        self.conv1 = nnx.Conv(cin, cmid, (3, 3), strides=2, padding=pad, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(cmid, epsilon=1e-3 if bug == "eps" else 1e-5, rngs=rngs)
        dilation = 1 if bug == "dilation" else 2
        self.conv2 = nnx.Conv(cmid, cout, (3, 3), padding=pads(dilation), kernel_dilation=dilation, rngs=rngs)
        self.bn2 = nnx.BatchNorm(cout, epsilon=1e-5, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        x = self.bn1(self.conv1(x), use_running_average=self.bug != "batch_statistics")
        x = self.conv2(nnx.relu(x))
        if self.bug == "relu_first":
            return self.bn2(nnx.relu(x), use_running_average=True)
        return nnx.relu(self.bn2(x, use_running_average=True))


class TorchConvBlock(nn.Module):
    """The same block."""

    def __init__(self, cin, cmid, cout):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cmid, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cmid)
        self.conv2 = nn.Conv2d(cmid, cout, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(cout)

    def forward(self, x):
        """Features at half the resolution."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def conv_block(bug=""):
    """Batch norm in eval mode; the image has even sides, where SAME differs from padding by one."""
    torch.manual_seed(20)
    theirs = settle(TorchConvBlock(3, 5, 7))
    tree = {name: linear(getattr(theirs, name)) for name in ("conv1", "conv2")}
    tree |= {name: norm(getattr(theirs, name)) for name in ("bn1", "bn2")}
    if bug == "deviation_for_variance":
        tree["bn2"]["var"] = jnp.sqrt(tree["bn2"]["var"])
    inputs, options = images(2, 3, 10, 14)
    return Pair(put(ConvBlock(3, 5, 7, rngs=nnx.Rngs(0), bug=bug), tree), theirs, inputs, IMAGES, options)


# --- a residual block with a strided shortcut ---


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a strided 1x1 shortcut."""

    def __init__(self, cin, cout, *, rngs, bug=""):
        self.conv1 = nnx.Conv(cin, cout, (3, 3), strides=2, padding=pads(1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(cout, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(cout, cout, (3, 3), padding=pads(1), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(cout, use_running_average=True, rngs=rngs)
        self.shortcut = nnx.Conv(cin, cout, (1, 1), strides=2, padding="VALID", use_bias=False, rngs=rngs)
        self.shortcut_bn = nnx.BatchNorm(cout, use_running_average=True, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bug == "relu_before_sum":
            y = nnx.relu(y)
        if self.bug == "stride_offset":
            x = jnp.roll(x, -1, axis=(1, 2))
        skip = self.shortcut(x)
        if self.bug == "no_shortcut_norm":
            return nnx.relu(y + skip)
        skip = self.shortcut_bn(skip)
        return nnx.relu(y + (jax.lax.stop_gradient(skip) if self.bug == "skip_detached" else skip))


class TorchBasicBlock(nn.Module):
    """The block of torchvision's ResNet-18."""

    def __init__(self, cin, cout):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride=2, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        """Features at half the resolution."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


def basic_block(bug=""):
    """The residual block; torch's ReLU works in place and is called twice."""
    torch.manual_seed(21)
    theirs = settle(TorchBasicBlock(4, 6))
    tree = {"conv1": linear(theirs.conv1), "conv2": linear(theirs.conv2), "shortcut": linear(theirs.downsample[0])}
    tree |= {"bn1": norm(theirs.bn1), "bn2": norm(theirs.bn2), "shortcut_bn": norm(theirs.downsample[1])}
    if bug == "flipped_kernel":
        tree["conv2"]["kernel"] = tree["conv2"]["kernel"][::-1, ::-1]
    inputs, options = images(3, 4, 9, 11)
    names = {"shortcut": "downsample.0", "shortcut_bn": "downsample.1"}
    ours = put(BasicBlock(4, 6, rngs=nnx.Rngs(0), bug=bug), tree)
    return Pair(ours, theirs, inputs, {"names": names} | IMAGES, options)


# --- depthwise and pointwise ---


class Separable(nnx.Module):
    """A depthwise convolution with two outputs a channel, a pointwise one and a grouped one."""

    def __init__(self, cin, cout, *, rngs, bug=""):
        self.depthwise = nnx.Conv(cin, 2 * cin, (3, 5), padding=((1, 1), (2, 2)), feature_group_count=cin, rngs=rngs)
        self.pointwise = nnx.Conv(2 * cin, 9, (1, 1), rngs=rngs)
        self.grouped = nnx.Conv(9, cout, (2, 2), padding="VALID", feature_group_count=3, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        x = self.depthwise(x)
        if self.bug == "channel_order":
            x = x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
        x = jnp.minimum(jax.nn.relu(x), 1.0) if self.bug == "relu1" else jax.nn.relu6(x)
        x = self.pointwise(x)
        if self.bug == "groups_shuffled":
            x = x.reshape(*x.shape[:-1], 3, 3).swapaxes(-1, -2).reshape(x.shape)
        return self.grouped(x)


class TorchSeparable(nn.Module):
    """The same three convolutions."""

    def __init__(self, cin, cout):
        super().__init__()
        self.depthwise = nn.Conv2d(cin, 2 * cin, (3, 5), padding=(1, 2), groups=cin)
        self.act = nn.ReLU6()
        self.pointwise = nn.Conv2d(2 * cin, 9, 1)
        self.grouped = nn.Conv2d(9, cout, 2, groups=3)

    def forward(self, x):
        """Features one row and one column smaller."""
        return self.grouped(self.pointwise(self.act(self.depthwise(x))))


def separable(bug=""):
    """Grouped convolutions."""
    torch.manual_seed(22)
    theirs = settle(TorchSeparable(5, 12))
    tree = {name: linear(getattr(theirs, name)) for name in ("depthwise", "pointwise", "grouped")}
    if bug == "rolled_bias":
        tree["grouped"]["bias"] = jnp.roll(tree["grouped"]["bias"], 1)
    inputs, options = images(2, 5, 7, 8)
    return Pair(put(Separable(5, 12, rngs=nnx.Rngs(0), bug=bug), tree), theirs, inputs, IMAGES, options)


# --- upsampling ---


class Upsample(nnx.Module):
    """A transposed convolution, nearest-neighbour upsampling, a convolution and a sum with the skip."""

    def __init__(self, cin, cmid, cout, *, rngs, bug=""):
        pad = ((1, 3), (1, 3)) if bug == "padding_shifted" else pads(2)
        self.up = nnx.ConvTranspose(cin, cmid, (4, 4), strides=2, padding=pad, transpose_kernel=True, rngs=rngs)
        self.conv = nnx.Conv(cmid, cout, (3, 3), padding=pads(1), rngs=rngs)
        self.skip = nnx.Conv(cin, cout, (1, 1), rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        n, h, w, _ = x.shape
        slope = 0.01 if self.bug == "slope" else 0.2
        y = self.conv(nnx.leaky_relu(self.up(x), negative_slope=slope))
        method = "bilinear" if self.bug == "bilinear" else "nearest"
        skip = self.skip(x)
        skip = jax.image.resize(skip, (n, 2 * h, 2 * w, skip.shape[-1]), method=method)
        return nnx.tanh(y + skip)


class TorchUpsample(nn.Module):
    """The same block."""

    def __init__(self, cin, cmid, cout):
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cmid, 4, stride=2, padding=1)
        self.conv = nn.Conv2d(cmid, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        """Features at twice the resolution."""
        y = self.conv(F.leaky_relu(self.up(x), 0.2))
        return torch.tanh(y + F.interpolate(self.skip(x), scale_factor=2, mode="nearest"))


def upsample(bug=""):
    """A transposed convolution with the kernel as torch lays it out."""
    torch.manual_seed(23)
    theirs = settle(TorchUpsample(6, 5, 3))
    tree = {name: linear(getattr(theirs, name)) for name in ("up", "conv", "skip")}
    if bug == "flipped_kernel":
        tree["up"]["kernel"] = tree["up"]["kernel"][::-1, ::-1]
    inputs, options = images(2, 6, 5, 7)
    return Pair(put(Upsample(6, 5, 3, rngs=nnx.Rngs(0), bug=bug), tree), theirs, inputs, IMAGES, options)


# --- ConvNeXt ---


class ConvNextBlock(nnx.Module):
    """Depthwise 7x7, norm over channels, two dense layers, layer scale, residual."""

    def __init__(self, dim, hidden, *, rngs, bug=""):
        self.dwconv = nnx.Conv(dim, dim, (7, 7), padding=pads(3), feature_group_count=dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5 if bug == "eps" else 1e-6, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, hidden, rngs=rngs)
        self.pwconv2 = nnx.Linear(hidden, dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((dim,), 1e-6, jnp.float32))
        self.bug = bug

    def __call__(self, x):
        h = self.dwconv(x)
        if self.bug == "norm_over_space":
            mean, var = h.mean(axis=(1, 2), keepdims=True), h.var(axis=(1, 2), keepdims=True)
            h = (h - mean) * jax.lax.rsqrt(var + 1e-6) * self.norm.scale[...] + self.norm.bias[...]
        else:
            h = self.norm(h)
        h = self.pwconv2(jax.nn.gelu(self.pwconv1(h), approximate=self.bug == "tanh_gelu"))
        return x + h if self.bug == "no_layer_scale" else x + self.gamma * h


class TorchConvNextBlock(nn.Module):
    """The same block, which turns its channels last and back."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.4))

    def forward(self, x):
        """x and its residual."""
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        h = self.gamma * self.pwconv2(self.act(self.pwconv1(h)))
        return x + h.permute(0, 3, 1, 2)


def convnext(bug=""):
    """Torch's inner layers have their channels last, as all of JAX's."""
    torch.manual_seed(24)
    theirs = settle(TorchConvNextBlock(6, 23))
    tree = {name: linear(getattr(theirs, name)) for name in ("dwconv", "pwconv1", "pwconv2")}
    tree |= {"norm": norm(theirs.norm), "gamma": array(theirs.gamma)}
    inputs, options = images(2, 6, 9, 8)
    ours = put(ConvNextBlock(6, 23, rngs=nnx.Rngs(0), bug=bug), tree)
    layouts = {"dwconv": "NHWC->NCHW", "dwconv.input": "NHWC->NCHW", "output": "NHWC->NCHW"}
    return Pair(ours, theirs, inputs, {"layouts": layouts, "names": {"gamma": "gamma"}}, options)


# --- squeeze and excitation ---


class SqueezeExcite(nnx.Module):
    """Channels weighted by what their means say, between two convolutions."""

    def __init__(self, cin, dim, squeezed, *, rngs, bug=""):
        self.conv = nnx.Conv(cin, dim, (3, 3), padding="VALID", rngs=rngs)
        self.reduce = nnx.Linear(dim, squeezed, rngs=rngs)
        self.expand = nnx.Linear(squeezed, dim, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        x = nnx.silu(self.conv(x))
        if self.bug == "mean_over_height":
            pooled = jnp.mean(x, axis=1)[:, 0]
        elif self.bug == "divisor":
            pooled = x.sum(axis=(1, 2)) / (x.shape[1] * x.shape[1])
        else:
            pooled = jnp.mean(x, axis=(1, 2))
        gate = self.expand(nnx.relu(self.reduce(pooled)))
        gate = jax.nn.hard_sigmoid(gate) if self.bug == "hard_sigmoid" else jax.nn.sigmoid(gate)
        if self.bug == "gate_detached":
            gate = jax.lax.stop_gradient(gate)
        return x * gate[:, None, None, :]


class TorchSqueezeExcite(nn.Module):
    """The same with 1x1 convolutions in place of dense layers."""

    def __init__(self, cin, dim, squeezed):
        super().__init__()
        self.conv = nn.Conv2d(cin, dim, 3)
        self.fc1 = nn.Conv2d(dim, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, dim, 1)

    def forward(self, x):
        """The weighted channels."""
        x = F.silu(self.conv(x))
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


def squeeze_excite(bug=""):
    """Torch's dense layers are convolutions: their kernels have two more axes, and their outputs too."""
    torch.manual_seed(31)
    theirs = settle(TorchSqueezeExcite(3, 13, 4))
    tree = {"conv": linear(theirs.conv)}
    for ours, layer in (("reduce", theirs.fc1), ("expand", theirs.fc2)):
        tree[ours] = {"kernel": array(layer.weight[:, :, 0, 0].T), "bias": array(layer.bias)}
    inputs, options = images(2, 3, 8, 9)
    ours = put(SqueezeExcite(3, 13, 4, rngs=nnx.Rngs(0), bug=bug), tree)
    rules = {"names": {"reduce": "fc1", "expand": "fc2"}} | IMAGES
    return Pair(ours, theirs, inputs, rules, options)


# --- patches and a mixer ---


class Mixer(nnx.Module):
    """Patches of 3x2 pixels, then dense layers over the patches and over the channels."""

    def __init__(self, cin, dim, patches, *, rngs, bug=""):
        self.embed = nnx.Conv(cin, dim, (3, 2), strides=(3, 2), padding="VALID", rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.token_fc1 = nnx.Linear(patches, 17, rngs=rngs)
        self.token_fc2 = nnx.Linear(17, patches, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.channel_fc1 = nnx.Linear(dim, 19, rngs=rngs)
        self.channel_fc2 = nnx.Linear(19, dim, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        x = self.embed(x)
        if self.bug == "patch_order":
            x = x.swapaxes(1, 2)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        h = self.norm1(x).swapaxes(1, 2)
        h = self.token_fc2(nnx.gelu(self.token_fc1(h), approximate=self.bug == "tanh_gelu"))
        y = x + h.swapaxes(1, 2)
        h = self.channel_fc2(nnx.gelu(self.channel_fc1(self.norm2(y)), approximate=False))
        return (x if self.bug == "residual_source" else y) + h


class TorchMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """An update of x."""
        return self.fc2(F.gelu(self.fc1(x)))


class TorchMixer(nn.Module):
    """The same mixer."""

    def __init__(self, cin, dim, patches):
        super().__init__()
        self.embed = nn.Conv2d(cin, dim, (3, 2), stride=(3, 2))
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = TorchMlp(patches, 17)
        self.norm2 = nn.LayerNorm(dim)
        self.channels = TorchMlp(dim, 19)

    def forward(self, x):
        """The mixed patches."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mixer(bug=""):
    """The patch embedding has its channels last in JAX; what follows is alike on both sides."""
    torch.manual_seed(26)
    theirs = settle(TorchMixer(4, 11, 12))
    tree = {"embed": linear(theirs.embed), "norm1": norm(theirs.norm1), "norm2": norm(theirs.norm2)}
    names = {}
    for ours, part in (("token", "tokens"), ("channel", "channels")):
        for layer in ("fc1", "fc2"):
            tree[f"{ours}_{layer}"] = linear(getattr(getattr(theirs, part), layer))
            names[f"{ours}_{layer}"] = f"{part}.{layer}"
    if bug == "embed_rolled":
        tree["embed"]["kernel"] = jnp.roll(tree["embed"]["kernel"], 1, axis=2)
    inputs, options = images(2, 4, 9, 8)
    ours = put(Mixer(4, 11, 12, rngs=nnx.Rngs(0), bug=bug), tree)
    layouts = {"embed": "NHWC->NCHW", "embed.input": "NHWC->NCHW"}
    return Pair(ours, theirs, inputs, {"names": names, "layouts": layouts}, options)


# --- one-dimensional convolutions and group norm ---


class WaveBlock(nnx.Module):
    """A causal dilated convolution, group norm and a gate, with a 1x1 residual."""

    def __init__(self, cin, dim, *, rngs, bug=""):
        self.filter = nnx.Conv(cin, 2 * dim, (3,), kernel_dilation=2, padding="VALID", rngs=rngs)
        self.gn = nnx.GroupNorm(2 * dim, num_groups=3 if bug == "groups" else 2, epsilon=1e-5, rngs=rngs)
        self.res = nnx.Conv(cin, dim, (1,), rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        padded = jnp.pad(x, ((0, 0), (2, 2) if self.bug == "not_causal" else (4, 0), (0, 0)))
        value, gate = jnp.split(self.gn(self.filter(padded)), 2, axis=-1)
        if self.bug == "gate_swapped":
            value, gate = gate, value
        return self.res(x) + jnp.tanh(value) * jax.nn.sigmoid(gate)


class TorchWaveBlock(nn.Module):
    """The same block."""

    def __init__(self, cin, dim):
        super().__init__()
        self.filter = nn.Conv1d(cin, 2 * dim, 3, dilation=2)
        self.gn = nn.GroupNorm(2, 2 * dim)
        self.res = nn.Conv1d(cin, dim, 1)

    def forward(self, x):
        """As many steps as x has."""
        value, gate = self.gn(self.filter(F.pad(x, (4, 0)))).chunk(2, dim=1)
        return self.res(x) + torch.tanh(value) * torch.sigmoid(gate)


def wave_block(bug=""):
    """Sequences: channels last in JAX, first in torch."""
    torch.manual_seed(27)
    theirs = settle(TorchWaveBlock(7, 9))
    tree = {"filter": linear(theirs.filter), "gn": norm(theirs.gn), "res": linear(theirs.res)}
    x = sample(2, 7, 13)
    ours = put(WaveBlock(7, 9, rngs=nnx.Rngs(0), bug=bug), tree)
    options = {"jax_inputs": (x.swapaxes(1, 2).copy(),)}
    return Pair(ours, theirs, (x,), {"layouts": {"*": "NWC->NCW"}}, options)


# --- pooling and a flat head ---


class PoolNet(nnx.Module):
    """Convolution, max pool, convolution, average pool, flatten, dense."""

    def __init__(self, cin, classes, *, rngs, bug=""):
        self.conv1 = nnx.Conv(cin, 5, (3, 3), padding=pads(1), rngs=rngs)
        self.conv2 = nnx.Conv(5, 7, (2, 3), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(7 * 2 * 3, classes, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        if self.bug == "average_for_max":
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        else:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = nnx.relu(self.conv2(x))
        count = self.bug != "divisor"
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding=((1, 1), (0, 0)), count_include_pad=count)
        if self.bug != "flatten_order":
            x = x.transpose(0, 3, 1, 2)  # the head's weight counts channels first
        return self.head(x.reshape(x.shape[0], -1))


class TorchPoolNet(nn.Module):
    """The same network."""

    def __init__(self, cin, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, 5, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(5, 7, (2, 3))
        self.average = nn.AvgPool2d(2, padding=(1, 0))
        self.head = nn.Linear(7 * 2 * 3, classes)

    def forward(self, x):
        """Logits of the classes."""
        x = self.conv2(self.pool(F.relu(self.conv1(x))))
        return self.head(self.average(F.relu(x)).flatten(1))


def pool_net(bug=""):
    """The head's input is flattened in torch's order."""
    torch.manual_seed(28)
    theirs = settle(TorchPoolNet(3, 11))
    tree = {"conv1": linear(theirs.conv1), "conv2": linear(theirs.conv2), "head": linear(theirs.head)}
    if bug == "head_kernel_order":
        kernel = tree["head"]["kernel"].reshape(7, 2, 3, 11)
        tree["head"]["kernel"] = kernel.transpose(1, 2, 0, 3).reshape(42, 11)
    inputs, options = images(2, 3, 8, 16)
    ours = put(PoolNet(3, 11, rngs=nnx.Rngs(0), bug=bug), tree)
    layouts = {name: "NHWC->NCHW" for name in ("conv1", "conv1.input", "conv2", "conv2.input")}
    return Pair(ours, theirs, inputs, {"layouts": layouts}, options)


PORTS = (
    Port(
        "nnx_conv_block",
        conv_block,
        {
            "same_padding": ("forward conv1",),
            "eps": ("forward bn1",),
            "dilation": ("forward conv2",),
            "batch_statistics": ("forward bn1",),
            "relu_first": ("forward bn2.input", "forward bn2"),
            "deviation_for_variance": ("weight bn2.running_var", "forward bn2"),
        },
    ),
    Port(
        "nnx_basic_block",
        basic_block,
        {
            "relu_before_sum": ("forward relu", "forward output"),
            "stride_offset": ("forward downsample.0.input", "forward downsample.0"),
            "no_shortcut_norm": ("forward downsample.1", "forward downsample", "forward relu", "forward output"),
            "skip_detached": ("backward downsample", "backward downsample.1"),
            "flipped_kernel": ("weight conv2.weight",),
        },
    ),
    Port(
        "nnx_separable",
        separable,
        {
            "channel_order": ("forward act", "forward pointwise.input", "forward pointwise"),
            "relu1": ("forward act", "forward pointwise.input", "forward pointwise"),
            "groups_shuffled": ("forward grouped.input", "forward grouped"),
            "rolled_bias": ("weight grouped.bias",),
        },
    ),
    Port(
        "nnx_upsample",
        upsample,
        {
            "padding_shifted": ("forward up",),
            "slope": ("forward conv.input", "forward conv"),
            "bilinear": ("forward output",),
            "flipped_kernel": ("weight up.weight",),
        },
    ),
    Port(
        "nnx_convnext",
        convnext,
        {
            "eps": ("forward norm",),
            "norm_over_space": ("forward norm", "forward pwconv1.input", "forward pwconv1"),
            "tanh_gelu": ("forward act", "forward pwconv2.input", "forward pwconv2"),
            "no_layer_scale": ("forward output",),
        },
    ),
    Port(
        "nnx_squeeze_excite",
        squeeze_excite,
        {
            "mean_over_height": ("forward fc1.input", "forward fc1"),
            "divisor": ("forward fc1.input", "forward fc1"),
            "hard_sigmoid": ("forward output",),
            "gate_detached": ("backward fc2",),
        },
    ),
    Port(
        "nnx_mixer",
        mixer,
        {
            "patch_order": ("forward norm1.input", "forward norm1"),
            "tanh_gelu": ("forward tokens.fc2.input", "forward tokens.fc2"),
            "residual_source": ("forward output",),
            "embed_rolled": ("weight embed.weight",),
        },
    ),
    Port(
        "nnx_wave_block",
        wave_block,
        {
            "not_causal": ("forward filter.input", "forward filter"),
            "groups": ("forward gn",),
            "gate_swapped": ("forward output",),
        },
    ),
    Port(
        "nnx_pool_net",
        pool_net,
        {
            "average_for_max": ("forward pool", "forward conv2.input", "forward conv2"),
            "divisor": ("forward average", "forward head.input", "forward head"),
            "flatten_order": ("forward head.input", "forward head"),
            "head_kernel_order": ("weight head.weight",),
        },
    ),
)
