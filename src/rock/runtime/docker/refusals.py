"""What an engine answers instead of doing it, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.docker.engine import EngineError


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """What the engine answers beside its use for a start, as an error of ours."""
    try:
        yield
    except EngineError as error:
        raise errors.Unavailable(f"the container engine refused ({what}): {error.message}",
                                 hint="see the engine's own log") from None


def refusal(error: EngineError, config: SandboxConfig) -> errors.RockError:
    """Why the engine did not make a container."""
    text = error.message
    low = text.lower()
    if "storage-opt" in low or "quota" in low:
        return errors.Unsupported(f"disk={config.disk}: {text}", hint="leave disk unset")
    if "no space left" in low:
        return errors.StorageFull(f"the container engine's disk is full: {text}")
    if "bind source path does not exist" in low or "ld.so" in low:
        return errors.Unsupported(f"the container engine does not see the files of this server: {text}",
                                  hint="run the rocklet on the engine's machine, not in a container")
    if error.status == 404 and "no such image" in low:
        return errors.ImageError(f"image {config.image} was removed from the engine meanwhile")
    return errors.StartFailed(f"the container engine could not start it: {text}")
