"""The judge is judged: what `check`, `check_all`, `compare` and `compare_modules` refuse, and an allowance by hand."""

import math

import numpy as np
import pytest
import torch

from parity_tests import example
from parity_tests.compare import precision, tolerance
from parity_tests.compare.errors import CompareError
from parity_tests.compare.functions import compare, own_error_allowances
from parity_tests.compare.montecarlo import SEEDS, allowances, amplification, rounded
from parity_tests.compare.report import Report, Row
from parity_tests.compare.tolerance import SAFETY, check, check_all, relative_error
from recipe.contract import UNIT_ROUNDOFF, accumulation_of

LIMIT = 2.0**-20
TRUTH = np.random.default_rng(0).standard_normal((4, 5))
UNIT = TRUTH / np.linalg.norm(TRUTH)


def moved(share: float) -> np.ndarray:
    """The truth, off by this share of the allowance, all of it in one element: the norm decides, not the mean."""
    value = TRUTH.copy()
    value[1, 2] += share * LIMIT * np.linalg.norm(TRUTH)
    return value


def with_value(value: float) -> np.ndarray:
    changed = TRUTH.copy()
    changed[3, 4] = value
    return changed


REFUSED = {
    "1.01 times the allowance": moved(1.01),
    "-1.01 times the allowance": moved(-1.01),
    "NaN": with_value(math.nan),
    "inf": with_value(math.inf),
    "-inf": with_value(-math.inf),
    "NaN everywhere": np.full_like(TRUTH, np.nan),
    "empty": TRUTH[:0],
    "transposed": TRUTH.T,
    "another shape of the same size": TRUTH.reshape(5, 4),
    "an axis of one": TRUTH[None],
    "a broadcast scalar": np.array(0.0),
    "one row too few": TRUTH[:3],
    "the other sign": -TRUTH,
    "zero": np.zeros_like(TRUTH),
    "twice": 2.0 * TRUTH,
    "a thousand times": 1000.0 * TRUTH,
    "an imaginary part": TRUTH + 1e-3j,
    "float16": TRUTH.astype(np.float16),
    "integers": TRUTH.astype(np.int64),
}
ACCEPTED = {
    "equal": TRUTH,
    "0.99 times the allowance": moved(0.99),
    "float64 in another byte order": TRUTH.astype(">f8"),
    "float32": TRUTH.astype(np.float32),
    "complex without an imaginary part": TRUTH.astype(np.complex128),
    "in another memory order": np.asfortranarray(TRUTH),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_every_judge_refuses(case):
    value = REFUSED[case]
    with pytest.raises(AssertionError, match="y"):
        check("y", value, TRUTH, LIMIT)
    with pytest.raises(AssertionError):
        check_all({"x": TRUTH, "y": value}, {"x": TRUTH, "y": TRUTH}, LIMIT)
    found = compare(
        lambda dtype: {"x": TRUTH, "y": TRUTH},
        lambda dtype: {"x": TRUTH, "y": value},
        dtypes=["float64"],
        allowance=lambda dtype, name: LIMIT,
    )
    assert found.exit_code == 1 and found.first_divergence.row.name == "y"


@pytest.mark.parametrize("case", ACCEPTED)
def test_every_judge_accepts(case):
    value = ACCEPTED[case]
    assert check("y", value, TRUTH, LIMIT) <= LIMIT
    found = compare(
        lambda dtype: {"y": TRUTH}, lambda dtype: {"y": value}, dtypes=["float64"], allowance=lambda *_: LIMIT
    )
    assert found.exit_code == 0, found.verdict()


@pytest.mark.parametrize("wrong", ["float64", "float32", "bfloat16"])
def test_one_dtype_that_is_wrong_is_enough(wrong):
    dtypes = ["float64", "float32", "bfloat16"]

    def reference(dtype):
        error = 0.0 if dtype == "float64" else UNIT_ROUNDOFF[dtype]
        return {"x": TRUTH * (1.0 + error), "y": TRUTH}

    def candidate(dtype):
        return reference(dtype) | ({"x": REFUSED["the other sign"]} if dtype == wrong else {})

    assert compare(reference, reference, dtypes=dtypes).exit_code == 0
    found = compare(reference, candidate, dtypes=dtypes)
    assert (found.exit_code, found.first_divergence.row.dtype, found.first_divergence.row.name) == (1, wrong, "x")


def test_a_truth_that_is_not_a_number_is_never_met():
    for bad in (math.nan, math.inf):
        with pytest.raises(AssertionError), np.errstate(invalid="ignore"):
            check("y", with_value(bad), with_value(bad), LIMIT)


@pytest.mark.parametrize("names", [("x",), ("x", "y", "z"), ("x", "Y"), ()])
def test_names_must_be_the_same(names):
    with pytest.raises(AssertionError, match=r"names differ|nothing to compare"):
        check_all(dict.fromkeys(names, TRUTH), {"x": TRUTH, "y": TRUTH}, LIMIT)


def test_nothing_is_no_comparison():
    with pytest.raises(AssertionError, match="nothing to compare"):
        check_all({}, {}, LIMIT)
    with pytest.raises(CompareError, match="the reference returns nothing"):
        compare(lambda dtype: {}, lambda dtype: {}, dtypes=["float64"])
    with pytest.raises(CompareError, match="the candidate returns nothing"):
        compare(lambda dtype: {"x": TRUTH}, lambda dtype: {}, dtypes=["float64"])


def test_an_allowance_may_differ_by_name():
    with pytest.raises(AssertionError, match="y: relative error"):
        check_all({"x": moved(3.0), "y": moved(3.0)}, {"x": TRUTH, "y": TRUTH}, {"x": 4 * LIMIT, "y": LIMIT}.get)


def test_errors_are_relative_to_the_truth_by_norm():
    assert relative_error(TRUTH + UNIT, TRUTH) == Rounded(1.0 / np.linalg.norm(TRUTH))
    assert relative_error(3.0 * UNIT, np.zeros_like(TRUTH)) == Rounded(3.0)
    assert relative_error(np.array(3 + 4j), np.array(0.0)) == 5.0
    assert relative_error(101.0 * UNIT, UNIT) == Rounded(100.0)


class Rounded:
    """Equal to this number up to the roundings of two norms of twenty elements."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __eq__(self, other) -> bool:
        return abs(other - self.value) <= 2 * (TRUTH.size + 2) * UNIT_ROUNDOFF["float64"] * abs(self.value)


def test_one_side_and_one_row_are_enough_for_a_divergence():
    limits = {"jax": LIMIT, "torch": LIMIT}
    fine = Row("float32", "a", (1,), {"jax": 0.0, "torch": LIMIT}, limits)
    for side in limits:
        for error in (1.01 * LIMIT, math.inf, math.nan):
            row = Row("float32", "b", (1,), {"jax": 0.0, "torch": 0.0} | {side: error}, limits)
            found = Report("", [fine, fine, row, fine])
            assert (found.exit_code, found.first_divergence.side, row.beyond) == (1, side, [side])
    assert Report("", [fine, fine]).exit_code == 0


def test_the_allowance_of_a_product_by_hand():
    """y = a * b, element by element: one rounding U(-u, u) each, whose root mean square is u / sqrt(3).

    Over n elements the relative norm of the noise is u sqrt(sum y^2 e^2 / sum y^2); its mean square is u^2 / 3 and its
    variance sum y^4 / (sum y^2)^2 * var(e^2), var(e^2) = u^4 (1/5 - 1/9). The largest of 8 draws lies within four
    deviations of the mean square.
    """
    a, b = (np.random.default_rng(seed).standard_normal(10_000) for seed in (1, 2))
    for dtype in ("float32", "bfloat16", "float64"):
        _, kappas = amplification(lambda: {"y": (torch.tensor(a) * torch.tensor(b)).numpy()}, dtype)
        y = a * b
        deviation = math.sqrt((1 / 5 - 1 / 9) * (y**4).sum()) / (y**2).sum()
        assert abs(kappas["y"] ** 2 - 1 / 3) <= 4 * deviation, "kappa is 1 / sqrt(3)"
        sides = 2 if dtype == "float64" else 1
        assert allowances(kappas, dtype)["y"] == sides * SAFETY * kappas["y"] * UNIT_ROUNDOFF[dtype]
    assert SAFETY == 2.0 and len(SEEDS) == 8, "what docs/parity.md says"


def test_the_allowance_of_a_sum_by_hand():
    """y = sum of K equal terms in bfloat16, which accumulates in float32: noise of at most u + sqrt(K) u32."""
    K = 64
    x = np.ones((2000, K))
    _, kappas = amplification(lambda: {"y": torch.tensor(rounded(x) * 0 + 1.0).sum(dim=1).numpy()}, "bfloat16")
    amplitude = 1.0 + math.sqrt(K) * UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF["bfloat16"]
    deviation = math.sqrt((1 / 5 - 1 / 9) / len(x))
    assert abs((kappas["y"] / amplitude) ** 2 - 1 / 3) <= 4 * deviation


def test_the_references_own_error_is_carried_on():
    u = UNIT_ROUNDOFF["float32"]
    truth = {name: np.ones(3) for name in "abc"}
    own = {"a": np.ones(3) * (1 + 3 * u), "b": np.ones(3) * (1 + 50 * u), "c": np.ones(3)}
    found = own_error_allowances(truth, own, "float32")
    for name, kappa in {"a": 3.0, "b": 50.0, "c": 50.0}.items():
        assert abs(found[name] / (SAFETY * kappa * u) - 1.0) <= 2**-20, "an error of 3 u is known to 2^-29 of itself"
    # In float64 a rounding at least, twice, for the truth errs as well.
    exact = own_error_allowances(truth, truth, "float64")
    assert set(exact.values()) == {2 * SAFETY * UNIT_ROUNDOFF["float64"]}


@pytest.mark.parametrize("plant", ["weight", "nan", "eps"])
def test_two_modules_that_differ_are_told_apart(plant, monkeypatch):
    made = example.flax_feed_forward

    def planted(block, eps):
        module = made(block, eps=1e-3 if plant == "eps" else eps)
        if plant != "eps":
            kernel = module.wide.kernel
            value = math.nan if plant == "nan" else kernel[...][0, 0] * (1 + 2.0**-10)
            kernel[...] = kernel[...].at[0, 0].set(value)
        return module

    monkeypatch.setattr(example, "flax_feed_forward", planted)
    found = example.make_report(dtypes=("float64", "float32"))
    first = {"eps": "forward layer_norm"}.get(plant, "weight DenseReluDense.wi.weight")
    assert found.exit_code == 1 and found.first_divergence.row.name == first


def test_the_table_of_cases_is_about_the_judge_that_runs():
    assert tolerance.check is check and len(REFUSED) > len(ACCEPTED) > 4


def test_the_comparison_of_ports_rounds_as_the_project_does():
    """It imports nothing of ours, so it has these numbers for itself."""
    assert precision.UNIT_ROUNDOFF == UNIT_ROUNDOFF
    assert all(precision.accumulation_of(dtype) == accumulation_of(dtype) for dtype in UNIT_ROUNDOFF)
