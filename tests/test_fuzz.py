"""Every reader of foreign input against mutated files: some hundreds here, 10,000 and more at night (`make fuzz`)."""

import pytest

from parity_tests.fuzz import faults, fuzz
from parity_tests.fuzz_targets import TARGETS
from tests.planted_readers import READERS

INPUTS = 100


@pytest.fixture(scope="module")
def results():
    return {result.target: result for result in fuzz(list(TARGETS), INPUTS)}


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_refused_in_one_line_or_read_as_others_read_it(name, results):
    result = results[name]
    assert not result.faults, "\n".join(faults(result))
    assert result.equal and not result.left_out, "the inputs test nothing"


@pytest.fixture(scope="module")
def planted():
    return {result.target: result for result in fuzz(list(READERS), 60, module="tests.planted_readers", seconds=1.0)}


@pytest.mark.parametrize("name", READERS)
def test_each_kind_of_fault_is_told_and_no_other(name, planted):
    result = planted[name]
    assert {kind for kind, _ in result.faults} == {name} - {"sound"}
    assert result.equal and result.inputs == result.refused + result.equal + result.faults.total()
