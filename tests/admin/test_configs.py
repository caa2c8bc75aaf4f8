"""Parsed configs of creates are cached apart from the ids in them."""

from __future__ import annotations

import pytest

from rock.errors import InvalidConfig
from rock.http.asgi import Configs


def test_creates_with_other_ids_share_one_config() -> None:
    configs = Configs()
    first, one = configs.read_named(b'{"image": "any:1", "sandbox_id": "a-1"}')
    second, two = configs.read_named(b'{"sandbox_id": "a-2", "image": "any:1"}')
    assert first is second and first.image == "any:1" and first.sandbox_id is None
    assert (one, two) == ("a-1", "a-2")
    third, none = configs.read_named(b'{"image": "any:1"}')
    assert third.image == "any:1" and none is None


@pytest.mark.parametrize("text", ['""', '"../x"', '"a b"', '"a\\n"', '"é"', "7", '["a"]', f'"{"a" * 200}"'])
def test_an_invalid_id_is_an_error(text: str) -> None:
    with pytest.raises(InvalidConfig, match="sandbox_id"):
        Configs().read_named(f'{{"image": "any:1", "sandbox_id": {text}}}'.encode())


def test_no_id_is_an_id_of_the_server() -> None:
    config, chosen = Configs().read_named(b'{"image": "any:1", "sandbox_id": null}')
    assert config.sandbox_id is None and chosen is None
