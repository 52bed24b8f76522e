"""What a seeded bug is: one or several edits of the source, and the tests of which one must fail under them."""

from typing import NamedTuple


class Edit(NamedTuple):
    """One replacement in one module's source; the text must occur there exactly once."""

    module: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A realistic slip, and the tests of which at least one must fail under it."""

    name: str
    module: str
    old: str
    new: str
    caught_by: str
    """pytest node ids, separated by spaces."""
    kind: str = "one half"
    """What sort of slip it is; the table is ordered by it."""
    also: tuple[Edit, ...] = ()
    """The same slip in other modules, planted together with the first."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All replacements."""
        return (Edit(self.module, self.old, self.new), *self.also)


class Equivalent(NamedTuple):
    """An edit that changes nothing a test of values could see, and why."""

    name: str
    edit: str
    reason: str
