"""Framing of a persistent shell: commands in, output and exit status out. Pure: bytes only, no I/O.

The shell runs a script that the rocklet extends: a pipe on its standard input, or, where that is a terminal, on
descriptor `script`. Each command is one `eval '...'` of that script, so that unbalanced quotes are an error of that
command at once and a heredoc cannot swallow the next command. After each command the shell reports on descriptor
`status`, never on its output:

    NUL D <exit status> <working directory> <token> NUL  the command is done (without the first NUL, from another shell)
    R <exit status> NUL                                   the shell was about to end, and restarts itself

Commands read /dev/null, so they cannot consume the script. A shell that ends for another reason than `exit` (`set -e`,
`set -u`, a signal of ours after a timeout) replaces itself by a new one in the same process. Its variables, functions,
options and working directory are passed on descriptor `state`, so the session stays usable. That requires bash; another
shell ends, and the session reports that.

Any program in a sandbox could write to these descriptors. They are no security boundary, only a channel that ordinary
output cannot be confused with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MAX_REPORT = 64 << 10


@dataclass(frozen=True)
class Dialect:
    """A family of shells: `bash`, or any POSIX `sh`, which supports only one-digit descriptors."""

    name: str
    script: int
    status: int
    errors: int
    state: int

    @property
    def is_bash(self) -> bool:
        return self.name == "bash"

    def argv(self, path: str, pty: bool = False) -> list[str]:
        options = ["--norc", "--noprofile"] if self.is_bash else []
        return [path, *options, *([f"/dev/fd/{self.script}"] if pty else [])]

    def environment(self, pty: bool = False, *, inherits: bool = False) -> dict[str, str]:
        """Setup of the shell that the first command reads from the environment and unsets: a shell reads a pipe byte by
        byte. inherits: it begins with a script of `inherited`."""
        if not self.is_bash:
            return {}
        return {_HOOK: _exit_hook(self, pty) + (_INHERIT.format(hook=_HOOK, state=self.state) if inherits else "")}


BASH = Dialect("bash", script=198, status=199, errors=197, state=196)
_NULL = 190  # /dev/null, in bash
SH = Dialect("sh", script=8, status=9, errors=7, state=6)


def quote(text: str) -> str:
    """`text` as one word of a shell; a word cannot contain NUL."""
    return "'" + text.replace("'", "'\\''") + "'"


def encode(text: str) -> bytes:
    """The bytes of a command; surrogate escapes become the original undecodable bytes."""
    return text.encode("utf-8", "surrogateescape")


_REPORT = """>&{status} command printf 'D %s %s %s\\0' "$?" "$PWD" """
# In bash the command wrapper is a read-only function, and /dev/null is open: each byte of a script on a pipe costs a
# system call, and each opened file costs several. The output of `set -x` takes the same way, and ends where the report
# begins.
_DONE = "__rock"
_BASH_REPORT = _DONE + """() {{ builtin printf '\\0D %s %s %s\\0' "$?" "$PWD" "$1"; }}
readonly -f {name}; exec {null}</dev/null
"""


# The trap runs when the shell is about to end. `exit` is a function only to distinguish a requested end from any other.
_BASH_EXIT = """\
exit() {{ local s=$?; __rock_exit=1; builtin exit "${{@:-$s}}"; }}
trap '__rock_exit="$? ${{__rock_exit-}}"; if [ "${{__rock_exit#* }}" != 1 ]; then set +eux; \
command printf "R %s\\0" "${{__rock_exit% *}}" >&{status}; \
{{ exec {state}< <(declare -p; declare -f; alias -p; shopt -p; set +o); }} 2>/dev/null; \
exec -a bash "$BASH" --norc --noprofile {source}; fi' EXIT
{report}shopt -s expand_aliases
"""


_HOOK = "__rock_hook"
# The script is a file, open at descriptor `state`, which it closes itself: it runs once, also when a rocklet crashes
# before it has sent the first command.
_INHERIT = "unset {hook}\n{{ . /dev/fd/{state}; }} >/dev/null 2>/dev/null\n"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Variables that a shell evaluates at its start, or that are read-only.
_OWN = re.compile(r"(BASH.*|SHELLOPTS|POSIXLY_CORRECT|ENV|UID|EUID|PPID|FUNCNAME|GROUPS|DIRSTACK|IFS|OPTIND|OPTERR)")


def can_export(name: str) -> bool:
    """Whether a variable has the same effect in a running shell as in the environment of a new one."""
    return _NAME.fullmatch(name) is not None and _OWN.fullmatch(name) is None


def exports(env: Mapping[str, str]) -> bytes:
    """Lines that export variables to the environment of a shell and of its processes."""
    return encode("".join(f"export {name}={quote(value)}\n" for name, value in env.items()))


def inherited(state: bytes) -> bytes:
    """The content of the file with which a bash begins that inherits the state of another one."""
    return b"exec %d<&-\n%s" % (BASH.state, state)


def trace(traceparent: str | None) -> bytes:
    """A line that sets TRACEPARENT for the next command, or unsets it. A read-only variable stays unchanged."""
    spec = f"export TRACEPARENT={quote(traceparent)}" if traceparent else "unset TRACEPARENT"
    # the whole line is redirected, because `set -x` prints it too
    return encode(f"{{ command {spec} || :; }} 2>/dev/null\n")


def _exit_hook(dialect: Dialect, pty: bool) -> str:
    source = f"/dev/fd/{dialect.script}" if pty else f"<&{dialect.script}"
    report = _BASH_REPORT.format(name=_DONE, null=_NULL)
    return _BASH_EXIT.format(status=dialect.status, state=dialect.state, source=source, report=report)


def _hold_script(dialect: Dialect, pty: bool) -> str:
    """A script on standard input is not accessible inside `eval ... </dev/null`, hence a second descriptor for it.

    Never inside an `eval`: bash 5.2 crashes when its own script is duplicated there.
    """
    return "" if pty else f"exec {dialect.script}<&0\n"


# Such files test PS1 to detect an interactive shell, and return early when it is not set.
_RC = "{ PS1='\\$ '; if [ -r ~/.bashrc ]; then . ~/.bashrc; fi; :; }"


def preamble(
    dialect: Dialect, token: int, *, cwd: str | None, sources: Sequence[str], rc: bool = False, pty: bool = False
) -> bytes:
    """The first script of a new shell in `Dialect.environment`. It reports like a command, with the status of the
    start-up file that failed.

    rc: bash reads the ~/.bashrc of its user and ignores its status, as an interactive shell does.
    """
    lines = [f'{_hold_script(dialect, pty)}eval "${_HOOK}"; unset {_HOOK}\n'] if dialect.is_bash else []
    if cwd is not None:
        lines.append(f"cd -- {quote(cwd)}\n")
    parts = [_RC] if rc and dialect.is_bash else []
    steps = " && ".join([*parts, *(f". {quote(path)}" for path in sources)])
    return encode("".join(lines)) + frame(dialect, steps or ":", token, pty=pty)


def begun(dialect: Dialect) -> bytes:
    """A script for a shell whose rocklet may have crashed between its start and its preamble; without effect
    otherwise."""
    if not dialect.is_bash:
        return b""
    unless = f"declare -F {_DONE} >/dev/null || "
    steps = (f"exec {dialect.script}<&0", f'{{ eval "${_HOOK}"; unset {_HOOK}; }}')
    return encode("".join(f"{{ {unless}{step}; }} 2>/dev/null\n" for step in steps))  # hidden from `set -x` too


def restore(dialect: Dialect, token: int, pty: bool = False) -> bytes:
    """The first script of a shell that replaced itself: restore the state of the old one."""
    text = (
        f"{{ . /dev/fd/{dialect.state}; }} 2>/dev/null >/dev/null\n"
        f"exec {dialect.state}<&-\n"
        "unset __rock_exit\n" + _hold_script(dialect, pty)
        # The report is part of the restored state; an error because it is read-only is ignored.
        + f"{{\n{_exit_hook(dialect, pty)}}} 2>/dev/null\n"
    )
    return encode(text) + frame(dialect, ":", token, pty=pty)


def frame(
    dialect: Dialect, command: str, token: int, *, previous: int = 0, separate: bool = False, pty: bool = False
) -> bytes:
    """One command for the shell.

    previous: exit status of the previous command, which `$?` has to show. separate: stderr to its own descriptor.
    Raises ValueError for a NUL, which no shell accepts.
    """
    if "\0" in command:
        raise ValueError("a command cannot contain a NUL character")
    # Under `set -e` a failing subshell would end the shell; in that case there is no status to restore either.
    carry = f"case $- in *e*) ;; *) (exit {previous}) ;; esac\n" if previous else ""
    errors = f" 2>&{dialect.errors}" if separate else ""
    if dialect.is_bash:
        aside = ("" if pty else f" <&{_NULL}") + errors
        return encode(f"{carry}eval {quote(command)}{aside}\n") + report(dialect, token)
    aside = ("" if pty else " </dev/null") + errors
    return encode(f"{carry}command eval {quote(command)}{aside}\n") + report(dialect, token)


def report(dialect: Dialect, token: int) -> bytes:
    """A line that makes the shell report; alone, it is a command of `token` without effect."""
    if dialect.is_bash:
        return b"{ %s %d; } >&%d 2>&1\n" % (_DONE.encode(), token, dialect.status)
    return encode(f"{{ {_REPORT.format(status=dialect.status)}{token}; }} 2>/dev/null\n")


@dataclass(frozen=True)
class Done:
    """The command of `token` ended with `code`, in folder `cwd`."""

    token: int
    code: int
    cwd: str


@dataclass(frozen=True)
class Restarted:
    """The shell was about to end with `code` and restarts itself."""

    code: int


Report = Done | Restarted


class ReportParser:
    """Parses the bytes of the status descriptor, in any portions, to reports. Other bytes are skipped."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[Report]:
        *lines, self._buffer = (self._buffer + data).split(b"\0")
        self._buffer = self._buffer[-MAX_REPORT:]
        for line in lines:
            report = _parse(line)
            if report is not None:
                yield report


def _parse(line: bytes) -> Report | None:
    kind, _, rest = line.partition(b" ")
    try:
        if kind == b"R":
            return Restarted(int(rest))
        if kind == b"D":
            code, _, rest = rest.partition(b" ")
            cwd, _, token = rest.rpartition(b" ")
            return Done(int(token), int(code), cwd.decode("utf-8", "surrogateescape"))
    except ValueError:
        pass
    return None
