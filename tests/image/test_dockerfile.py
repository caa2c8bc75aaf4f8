"""Reading Dockerfiles: what they say, what is refused with its line, and that nothing else ever comes of any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.errors import InvalidConfig, RockError, Unsupported
from rock.images.dockerfile import KEYWORDS, Words, pairs, parse
from rock.rocklet.images.build_plan import BuildScope, Plan, Settings, apply


def only(text: str) -> list[tuple[int, str, str]]:
    (stage,) = parse(text).stages
    return [(found.line, found.keyword, found.text) for found in stage.instructions]


def test_lines_comments_and_escapes() -> None:
    text = "# a comment\n\nFROM a\nrun one \\\n  # in between\n\n  two\\\n three\n  # end\nRUN tail \\\\\nCMD x\n"
    assert only(text) == [(4, "RUN", "one   two three"), (10, "RUN", "tail \\\\"), (11, "CMD", "x")]
    assert only("\ufeffFROM a\r\nRUN b \\\r\n c\r\n") == [(2, "RUN", "b  c")]
    assert only("# escape=`\nFROM a\nRUN b `\n c\\\n") == [(3, "RUN", "b  c\\")]
    assert only("FROM a\nRUN\tb") == [(2, "RUN", "b")]
    assert only("# syntax=docker/dockerfile:1.7\n# check=skip=all\nFROM a\nRUN b") == [(4, "RUN", "b")]


def test_stages() -> None:
    found = parse("ARG A=1\nFROM --platform=$BUILDPLATFORM base:$A AS One\nRUN x\nFROM one\nCOPY --from=One /a /b")
    assert [(stage.base, stage.name, stage.platform) for stage in found.stages] == [
        ("base:$A", "one", "$BUILDPLATFORM"), ("one", "", "")]  # fmt: skip
    assert found.stages[1].instructions[0].flags == {"from": "One"} and found.args[0].text == "A=1"


def test_forms() -> None:
    (stage,) = parse('FROM a\nRUN ["b", "c d"]\nRUN [ -f x ]\nCOPY --chown=1:2 --link --chmod=755 ["a b", "/c"]').stages
    run, shell, copy = stage.instructions
    assert run.array == ("b", "c d") and shell.array is None and shell.text == "[ -f x ]"
    assert copy.flags == {"chown": "1:2", "link": "true", "chmod": "755"} and copy.array == ("a b", "/c")


def test_here_documents() -> None:
    text = "FROM a\nRUN <<EOF\none\n# two\nEOF\nCOPY <<-'A' <<\"B\" /x/\n\tfirst $V\n\tA\nsecond\nB\n" \
           "RUN cat <<E > /f && echo\nin\nE\n" \
           'RUN echo "<<NO" a<<NO $((1<<2)) <<<here\nCMD x'  # fmt: skip
    (stage,) = parse(text).stages
    plain, copy, shell, none, last = stage.instructions
    assert [(h.name, h.text, h.expand) for h in plain.heredocs] == [("EOF", "one\n# two\n", True)]
    assert [(h.name, h.text, h.expand) for h in copy.heredocs] == [
        ("A", "first $V\n", False), ("B", "second\n", False)]  # fmt: skip
    assert shell.heredocs[0].text == "in\n" and shell.text == "cat <<E > /f && echo"
    assert none.heredocs == () and last.text == "x"


VARIABLES = {"A": "1", "EMPTY": "", "TWO": "a b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a  b\tc", ["a", "b", "c"]),
        ("$A ${A}x $NONE. $TWO", ["1", "1x", ".", "a b"]),
        ("\"a $A\" 'b $A' c\\ d \\$A", ["a 1", "b $A", "c d", "$A"]),
        ("${NONE:-x} ${EMPTY:-x} ${EMPTY-x} ${A:+y} ${EMPTY:+y} ${EMPTY+y}", ["x", "x", "", "y", "", "y"]),
        ("${NONE:-${A}${TWO}} ${A:?no}", ["1a b", "1"]),
        ("$ $1 100%$", ["$", "$1", "100%$"]),
        ('"a\\"b\\c"', ['a"b\\c']),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert Words(VARIABLES, "\\", 1).split(text) == words


@pytest.mark.parametrize(
    ("text", "line", "match"),
    [
        ("", None, "no FROM"),
        ("RUN x", 1, "before the first FROM"),
        ("FROM a\n\nFOO x", 3, "'FOO' is no instruction"),
        ("FROM a\nRUN", 2, "RUN says nothing"),
        ("FROM a b", 1, "not of the form"),
        ("FROM a AS 1x", 1, "no name for a stage"),
        ("FROM a AS x\nFROM b AS X", 2, "two of it"),
        ("FROM a\nRUN <<E\nx", 2, "does not end"),
        ("FROM a\nCOPY --nothing=1 a b", 2, "no flag --nothing=1"),
        ("FROM a\nCOPY --from a b", 2, "has no value"),
        ("FROM a\nCOPY --from=a --from=b c d", 2, "there twice"),
        ("FROM a\nRUN a\0b", 2, "NUL"),
        ("# escape=x\nFROM a", 1, "neither"),
        ("# escape=x" + " " * (1 << 19) + "x\nFROM a", 1, "neither"),
        ("FROM a\n" + "RUN x\n" * 3000, 2001, "more than 2000"),
        ("FROM a\n#" + "x" * (1 << 20), None, "more than the limit"),
    ],
)
def test_what_is_wrong(text: str, line: int | None, match: str) -> None:
    with pytest.raises(InvalidConfig, match=match) as caught:
        parse(text)
    if line is not None:
        assert f"Dockerfile line {line}: " in caught.value.message and caught.value.details["line"] == line


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("RUN --mount=type=cache,target=/x y", r"line 2: RUN --mount is not supported"),
        ("RUN --mount=type=secret,id=x y", "mount"),
        ("RUN --security=insecure y", "security"),
        ("COPY --parents a b", "parents"),
        ("ADD --checksum=sha256:0 a b", "checksum"),
    ],
)
def test_what_is_not_supported(text: str, match: str) -> None:
    with pytest.raises(Unsupported, match=match) as caught:
        parse(f"FROM a\n{text}")
    assert caught.value.hint
    with pytest.raises(Unsupported, match="syntax"):
        parse("# syntax=example.com/mine:1\nFROM a")


def applied(*lines: str, settings: Settings | None = None, args: dict[str, str] | None = None) -> Settings:
    found = settings or Settings()
    (stage,) = parse("\n".join(("FROM a", *lines))).stages
    for instruction in stage.instructions:
        found, _ = apply(instruction, found, BuildScope(args or {}, found.env, "\\"))
    return found


def test_settings() -> None:
    made = applied(
        'ENV A=1 B="two words" C=$WHO', "ENV OLD form of it", "ENV A=2 D=$A", "LABEL x=y 'z z'=\"$A\"", "WORKDIR /a",
        "WORKDIR b/../c", "USER me:$GROUP", 'SHELL ["/bin/bash", "-c"]', "CMD run it", 'ENTRYPOINT ["/e"]',
        "EXPOSE 80 90-92/udp $A", "VOLUME /v /w", "STOPSIGNAL SIGINT", "MAINTAINER somebody",
        "HEALTHCHECK --interval=1m30s --retries=3 CMD curl x", args={"WHO": "you", "GROUP": "us", "A": "hidden"},
    )  # fmt: skip
    assert made.env == {"A": "2", "B": "two words", "C": "you", "OLD": "form of it", "D": "1"}
    assert made.labels == {"x": "y", "z z": "2", "maintainer": "somebody"}
    assert (made.cwd, made.user, made.cmd, made.entrypoint) == ("/a/c", "me:us", ("/bin/bash", "-c", "run it"), ("/e",))
    assert made.other["ExposedPorts"] == {"80/tcp": {}, "90/udp": {}, "91/udp": {}, "92/udp": {}, "2/tcp": {}}
    assert made.other["Volumes"] == {"/v": {}, "/w": {}} and made.other["StopSignal"] == "SIGINT"
    assert made.other["Healthcheck"] == {"Test": ["CMD-SHELL", "curl x"], "Interval": 90 * 10**9, "Retries": 3}


def test_variables_do_not_double_without_end() -> None:
    line, settings = parse("FROM a\nENV A=$A$A B=x").stages[0].instructions[0], Settings(env={"A": "x"})
    with pytest.raises(InvalidConfig, match="line 2: its variables have more than"):
        for _ in range(60):
            settings, _ = apply(line, settings, BuildScope({}, settings.env, "\\"))
    assert len(settings.env["A"]) <= 1 << 20
    doubled = "".join("ARG A=$A$A\n" for _ in range(60))
    with pytest.raises(InvalidConfig, match="its variables have more than"):
        Plan(parse(f"ARG A=x\n{doubled}FROM a"), {})


def test_a_number_of_no_stage() -> None:
    read = parse(f"FROM a\nCOPY --from={'9' * 5000} b c")
    assert list(Plan(read, {}).needed(0)) == [0]


def test_a_new_entry_point_drops_the_command_below() -> None:
    below = Settings(cmd=("old",), entrypoint=("/old",))
    assert applied('ENTRYPOINT ["/new"]', settings=below).cmd == ()
    assert applied('CMD ["own"]', 'ENTRYPOINT ["/new"]', settings=below).cmd == ("own",)
    assert applied('CMD ["own"]', settings=below).entrypoint == ("/old",)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("ENV A", "has no value"),
        ("ENV A=1 B", "not NAME=VALUE"),
        ("ENV =x", "not NAME=VALUE"),
        ('ENV A="x', "not closed"),
        ("ENV A=${B", "not closed"),
        ('ENV A="${B:?is missing}"', "B: is missing"),
        ("ENV A=${!B}", "names no variable"),
        ("WORKDIR $NOTHING", "is nothing"),
        ("USER a b", "not of the form"),
        ("EXPOSE 0", "no port"),
        ("EXPOSE 1-65535", "no port"),
        ("EXPOSE 99999", "no port"),
        ("SHELL bash -c", "not of the form"),
        ("HEALTHCHECK curl x", "neither"),
        ("HEALTHCHECK --interval=soon CMD x", "no duration"),
        ("HEALTHCHECK --retries=-1 CMD x", "no number"),
    ],
)
def test_settings_that_are_wrong(line: str, match: str) -> None:
    with pytest.raises(InvalidConfig, match=f"line 2: .*{match}"):
        applied(line)


@pytest.mark.parametrize("line", ["ONBUILD RUN x", "ENV A=${B#x}", "ENV A=${B/x/y}"])
def test_settings_that_are_not_supported(line: str) -> None:
    with pytest.raises(Unsupported, match="line 2: "):
        applied(line)


# ---- whatever is in it


PIECES = st.sampled_from([
    *sorted(KEYWORDS), *(word.lower() for word in ("FROM", "RUN", "COPY")), " ", "\n", "\\\n", "\t", "# ",
    "# escape=`\n", "a", "/b", "$A", "${A:-", "}", '"', "'", "\\", "[", "]", '["a"]', "<<E", "<<-'E'", "\nE\n", "=",
    "--from=", "--mount=", ",", "AS", "scratch", "\0", "\ufeff", "\r\n", "é", "\ud800",
])  # fmt: skip


@given(st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=60).map("".join),
                 st.lists(PIECES, max_size=60).map(lambda pieces: "FROM a\n" + "".join(pieces))))  # fmt: skip
def test_any_text_is_read_or_refused_with_a_word(text: str) -> None:
    try:
        found = parse(text)
    except RockError as error:
        assert error.message and isinstance(error, InvalidConfig | Unsupported)
        return
    lines = text.count("\n") + 1
    for stage in found.stages:
        settings = Settings()
        for instruction in stage.instructions:
            assert 1 <= instruction.line <= lines and instruction.keyword in KEYWORDS and instruction.text
            try:
                if instruction.keyword in ("RUN", "COPY", "ADD", "ARG", "FROM"):
                    words = Words(settings.env, found.escape, instruction.line).split(instruction.text)
                    assert all(isinstance(word, str) for word in words)
                else:
                    settings, _ = apply(instruction, settings, BuildScope({}, settings.env, found.escape))
            except RockError as error:
                assert f"line {instruction.line}: " in error.message


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,9}", fullmatch=True),
                       st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=30)))  # fmt: skip
def test_quoted_values_come_back(values: dict[str, str]) -> None:
    def quoted(text: str) -> str:
        for mark in ("\\", '"', "$"):
            text = text.replace(mark, "\\" + mark)
        return f'"{text}"'

    if not values:
        return
    text = "FROM a\nENV " + " ".join(f"{name}={quoted(value)}" for name, value in values.items())
    (stage,) = parse(text).stages
    assert dict(pairs(stage.instructions[0], Words({}, "\\", 2))) == values
