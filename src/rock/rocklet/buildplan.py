"""Which stages of a Dockerfile a build needs, and what its arguments are. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rock.errors import NotFound
from rock.rocklet.instructions import Place
from rock.runtime.image.dockerfile import Dockerfile, Instruction, Stage, Words, bounded, refuse, unsupported
from rock.runtime.image.importer import this_architecture


class Plan:
    """A Dockerfile with the arguments that a build was given. `args_used`: names of those that an ARG took."""

    def __init__(self, read: Dockerfile, given: Mapping[str, str]) -> None:
        self.stages = read.stages
        self.escape = read.escape
        self.args_used: set[str] = set()
        self._given = given
        self._outside: dict[str, str] = {
            f"{side}{what}": value for side in ("TARGET", "BUILD")
            for what, value in (("PLATFORM", f"linux/{this_architecture()}"), ("OS", "linux"),
                                ("ARCH", this_architecture()))
        }  # fmt: skip
        outside = self._outside
        for instruction in read.args:
            outside = self.arguments(instruction, Place(outside, {}, self.escape))
        self._outside = outside

    def arguments(self, instruction: Instruction, place: Place) -> dict[str, str]:
        """The arguments after an ARG: what was given, else its default, else that of before the first FROM."""
        args = dict(place.args)
        words = place.words(instruction.line)
        for word in words.raw(instruction.text):
            name, equals, default = word.partition("=")
            self.args_used.add(name)
            if name in self._given:
                args[name] = self._given[name]
            elif equals:
                args[name] = words.one(default)
            elif name in self._outside:
                args[name] = self._outside[name]
        bounded(args, instruction.line)
        return args

    def number(self, name: str, before: int | None = None, by_number: bool = True) -> int | None:
        """The stage of a name, or of a number, among those before one."""
        stages = self.stages[:before]
        for number, stage in enumerate(stages):
            if name and stage.name == name.lower():
                return number
        is_number = by_number and name.isascii() and name.isdigit() and len(name) < 10
        return int(name) if is_number and int(name) < len(stages) else None

    def wanted(self, target: str | None) -> int:
        """The stage to build; NotFound."""
        found = len(self.stages) - 1 if target is None else self.number(target)
        if found is None:
            names = ", ".join(stage.name for stage in self.stages if stage.name)
            raise NotFound(f"the Dockerfile has no stage {target!r}", hint=f"it has {names or 'no names'}")
        return found

    def base(self, stage: Stage) -> str:
        """What is in a stage's FROM. InvalidConfig, Unsupported for another machine's platform."""
        words = Words(self._outside, self.escape, stage.line)
        base, platform = words.one(stage.base), words.one(stage.platform)
        if not base.strip():
            raise refuse(stage.line, f"FROM {stage.base} is nothing", "give the ARG a value")
        if platform not in ("", f"linux/{this_architecture()}"):
            raise unsupported(stage.line, f"platform {platform}: only linux/{this_architecture()} runs here")
        return base

    def needed(self, wanted: int) -> Sequence[int]:
        """The stages that one needs, itself last."""
        found: set[int] = set()
        todo = [wanted]
        while todo:
            number = todo.pop()
            if number in found:
                continue
            found.add(number)
            stage = self.stages[number]
            base = self.number(self.base(stage), number, by_number=False)
            todo += [base] if base is not None else []
            for instruction in stage.instructions:
                source = instruction.flags.get("from", "")
                other = self.number(source, number)
                if other is None and self.number(source) is not None:
                    raise refuse(instruction.line, f"stage {source!r} comes later, or is this one")
                todo += [other] if other is not None else []
        return sorted(found)
