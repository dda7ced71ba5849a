"""The first import of diffusers and transformers: without remarks, and with an error that names what is broken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fastory import packages
from fastory.errors import FastoryError


@contextmanager
def imported() -> Iterator[None]:
    """Around that import. Raises FastoryError where an installed torchvision cannot be imported, which breaks transformers.

    diffusers imports image processors that remark, each once in a process, that torchvision is missing; Pillow's are used
    here, with torchvision or without.
    """
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(_is_no_remark)
    try:
        yield
    except ImportError as error:
        if (line := packages.broken_torchvision()) is None:
            raise
        raise FastoryError(line) from error
    finally:
        logger.removeFilter(_is_no_remark)


def _is_no_remark(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in str(record.msg)
