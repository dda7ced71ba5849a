"""What others add: modes, schedulers and backends, in packages of their own.

A package names a module under the entry point group `fastory`. The module is imported when a name is asked for that fastory
itself does not have, and registers what it brings: fastory.modes.mode.register, settings.SCHEDULERS,
fastory.kernels.backends.register.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from fastory.errors import InputError
from fastory.wording import last_words

GROUP = "fastory"


@functools.cache
def load() -> None:
    """Import every plug-in, once. Raises InputError, with the plug-in's name, for one that cannot be imported."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # whatever a stranger's module raises
            owner = point.dist.name if point.dist else point.value
            raise InputError(
                f"the plug-in {point.name} of {owner} cannot be imported ({last_words(error)}); mend it, or "
                f"uninstall {owner}"
            ) from error
