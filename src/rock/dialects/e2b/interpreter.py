"""The code interpreter of a sandbox, port 49999: contexts, and the results of code as they come."""

from __future__ import annotations

from rock.dialects.e2b.call import Call
from rock.dialects.e2b.programs import Programs
from rock.http.asgi import Answer

PORT = 49999


class Interpreter:
    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    async def serve(self, path: str, call: Call) -> Answer | None:
        return None
