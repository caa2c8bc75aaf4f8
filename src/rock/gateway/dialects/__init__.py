"""The dialects of model APIs, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rock.gateway.dialects import openai_chat
from rock.gateway.dialects.openai_chat import DialectError as DialectError
from rock.gateway.dialects.openai_chat import Truncated as Truncated

Dialect = Any
DIALECTS: Mapping[str, Any] = {"openai-chat": openai_chat.OpenAIChat()}
