"""What others add: modes, schedulers and backends, in packages of their own.

A package names a module under the entry point group `fastory`. The module is imported when a name is asked for that fastory
itself does not have, and registers what it brings: fastory.modes.mode.register, settings.SCHEDULERS,
fastory.kernels.backends.register. What stands in the group `fastory.mode` or `fastory.scheduler` as well, by the name that
users give, is in --help and is completed by the shell, which import no module:

    [project.entry-points."fastory.scheduler"]
    euler-karras = "story_plug_in"
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from fastory.errors import InputError
from fastory.wording import last_words

KINDS = ("mode", "scheduler")  # what has a group of its own, by name
GROUPS = ("fastory", *(f"fastory.{kind}" for kind in KINDS))


def names(kind: str) -> tuple[str, ...]:
    """The modes or schedulers that plug-ins say they bring, as their packages' metadata has it; of other kinds none."""
    return tuple(sorted(entry_points(group=f"fastory.{kind}").names)) if kind in KINDS else ()


@functools.cache
def load() -> None:
    """Import every plug-in, once. Raises InputError, with the plug-in's name, for one that cannot be imported."""
    for point in (point for group in GROUPS for point in entry_points(group=group)):
        try:
            point.load()
        except Exception as error:  # whatever a stranger's module raises
            owner = point.dist.name if point.dist else point.value
            raise InputError(
                f"the plug-in {point.name} of {owner} cannot be imported ({last_words(error)}); mend it, or "
                f"uninstall {owner}"
            ) from error
