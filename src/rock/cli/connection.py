"""The server that a command uses, and the sandboxes that its arguments name.

The server is the first of: the option --base-url, ROCK_BASE_URL, the current context (`rock login`, `rock context
use`), the server that runs with this ROCK_HOME, http://127.0.0.1:8080.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rock import settings
from rock.cli.contexts import Contexts, server_of
from rock.errors import InvalidConfig, NotFound, Unsupported

if TYPE_CHECKING:  # the SDK is imported by the first call
    from rock.protocol.sandbox import SandboxInfo
    from rock.sync import Client, Sandbox

LIVING = "pending,running,stopping"


@dataclass
class Options:
    """The global options. base_url, api_key: None is the default of the SDK. source: where base_url comes from."""

    base_url: str | None = None
    api_key: str | None = None
    verbose: bool = False
    source: str = "default"
    passes_codes: bool = False  # the command passes on the exit code of a program, so that its own errors are 125


OPTIONS = Options()


def connect_options(base_url: str | None, api_key: str | None) -> None:
    """Set the server and the key from the options, the environment, the current context or ROCK_HOME."""
    OPTIONS.api_key = api_key
    if base_url is not None:
        OPTIONS.base_url, OPTIONS.source = base_url, "the option --base-url"
        return
    if settings.variable("ROCK_BASE_URL"):
        OPTIONS.base_url, OPTIONS.source = None, "ROCK_BASE_URL"
        return
    home = settings.home()
    context = Contexts(home).current
    if context is not None:
        OPTIONS.base_url, OPTIONS.source = context.url, f"the context {context.name}"
        OPTIONS.api_key = api_key or context.api_key
        return
    OPTIONS.base_url = server_of(home)
    OPTIONS.source = f"the server of {home}" if OPTIONS.base_url else "the default"


def client() -> Client:
    from rock.sync import Client

    return Client(OPTIONS.base_url, OPTIONS.api_key)


def drain_rocklet() -> tuple[Callable[[], int], Callable[[], None]]:
    """Drain the rocklet of ROCK_HOME, or all of its processes; returns functions that count its sandboxes, and that
    have them archived. After that call, those without processes count too. NotFound, Unsupported."""
    import json
    import os
    import signal

    from rock.sync import Client

    home = settings.home()
    url = server_of(home)
    note = json.loads((home / "server.json").read_text()) if url else {}
    if url is None or not note.get("joins"):
        raise NotFound(f"no rocklet that joined a server runs with ROCK_HOME={home}",
                       hint="set ROCK_HOME to the one of the rocklet, or name a worker")
    os.kill(int(note["pid"]), signal.SIGUSR1)
    owns = [Client(url, OPTIONS.api_key)]
    folders = sorted((home / settings.PROCESSES).glob("*"))
    if folders:  # of several processes, each with its own key
        given = OPTIONS.api_key or settings.variable("ROCK_API_KEY")
        owns = [Client(one, given or (folder / settings.OWNER_KEY).read_text().strip())
                for folder in folders if (one := server_of(folder)) is not None]  # fmt: skip

    archiving = False

    def left() -> int:
        found = [own.transport.json("GET", "/node/v1/sandboxes") for own in owns]
        return sum(len(one["sandboxes"]) + (len(one["kept"]) if archiving else 0) for one in found)

    def archive() -> None:
        nonlocal archiving
        if not note.get("evacuates"):
            raise Unsupported("the rocklet is older than this command, and cannot request archives",
                              hint="restart it, or drain it without --archive")
        archiving = True
        os.kill(int(note["pid"]), signal.SIGUSR2)

    return left, archive


def new_sandbox(image: str, **fields: Any) -> Sandbox:
    """An unstarted sandbox on the server that the options name."""
    from rock.sync import Sandbox, SandboxConfig

    where = {"base_url": OPTIONS.base_url, "api_key": OPTIONS.api_key}
    given = {k: v for k, v in {**where, **fields}.items() if v is not None}
    return Sandbox(SandboxConfig(image=image, **given))


def find(text: str, server: Client | None = None) -> SandboxInfo:
    """The sandbox with this id or name, or the only one with this id prefix; those that run come first. NotFound,
    InvalidConfig."""
    server = server or client()
    try:
        return server.get_sandbox(text)
    except NotFound as error:
        missing = error
    for states in (LIVING, None):
        known = server.list_sandboxes(states) if text else []
        named = [info for info in known if info.name == text]
        if named:
            return named[0]  # of ended ones the newest: the name of a running one is unique
        found = [info for info in known if info.sandbox_id.startswith(text)]
        if len(found) > 1:
            names = ", ".join(info.sandbox_id for info in found[:5])
            raise InvalidConfig(f"{text} is the beginning of several ids: {names}", hint="write more digits of the id")
        if found:
            return found[0]
    raise missing


def connected(text: str) -> Sandbox:
    """The sandbox with this id, name or id prefix."""
    info = find(text)
    sandbox = new_sandbox(info.image)
    sandbox.sandbox_id = info.sandbox_id
    return sandbox


def variables(pairs: tuple[str, ...], option: str = "--env", lone: bool = False) -> dict[str, str]:
    """K=V pairs. lone: K alone takes its value from this process's environment, as in Docker."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if lone and name and not equals:
            given = settings.variable(name)
            if given is None:
                raise InvalidConfig(f"{option} {name}: this environment has no such variable, and the text is not K=V",
                                    hint=f"write {option} {name}=VALUE")
            found[name] = given
            continue
        if not equals or not name:
            raise InvalidConfig(f"{option}: {pair!r} is not K=V", hint=f"write it like {option} NAME=value")
        found[name] = value
    return found
