from __future__ import annotations

import hashlib
import re
import string
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.keys import ApiKey, Plan, bearer, digest, mint, well_formed

quick = settings(max_examples=100, deadline=None)

SECRETS = st.binary(min_size=32, max_size=32)
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY = mint(bytes(range(32)))


def number(base62: str) -> int:
    value = 0
    for character in base62:
        value = value * 62 + ALPHABET.index(character)
    return value


def spelled(checksum: int) -> str:
    return "".join(ALPHABET[checksum // 62**place % 62] for place in range(5, -1, -1))


@quick
@given(SECRETS)
@example(bytes(32))
@example(b"\xff" * 32)
def test_a_key_is_its_prefix_the_secret_and_a_checksum_in_base62(secret: bytes) -> None:
    match = re.fullmatch(r"rp_live_([0-9A-Za-z]{43})([0-9A-Za-z]{6})", mint(secret))
    assert match
    body, checksum = match.groups()
    assert number(body) == int.from_bytes(secret)
    assert number(checksum) == zlib.crc32(body.encode())


@quick
@given(SECRETS)
def test_a_key_that_was_made_is_well_formed(secret: bytes) -> None:
    assert well_formed(mint(secret))


@quick
@given(SECRETS, SECRETS)
def test_two_secrets_make_two_keys(one: bytes, other: bytes) -> None:
    assert (mint(one) == mint(other)) == (one == other)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_is_made_of_32_bytes_and_of_nothing_else(length: int) -> None:
    with pytest.raises(ValueError, match="32 random bytes"):
        mint(bytes(length))


@pytest.mark.parametrize("position", range(len(KEY)))
def test_no_other_character_fits_anywhere(position: int) -> None:
    for character in set(string.printable + "é\u0660\uff10\0\ud800") - {KEY[position]}:
        assert not well_formed(KEY[:position] + character + KEY[position + 1 :])


@quick
@given(SECRETS, st.integers(0, len(KEY) - 1), st.characters(exclude_categories=()))
def test_a_wrong_character_is_noticed_in_any_key(secret: bytes, position: int, character: str) -> None:
    key = mint(secret)
    changed = key[:position] + character + key[position + 1 :]
    assert well_formed(changed) == (changed == key)


@quick
@given(SECRETS, st.integers(0, len(KEY)), st.characters(exclude_categories=()))
def test_a_character_too_many_or_too_few_is_noticed(secret: bytes, position: int, character: str) -> None:
    key = mint(secret)
    assert not well_formed(key[:position] + character + key[position:])
    assert not well_formed(key[:position] + key[position + 1 :]) or position == len(key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rp_live_",
        KEY.removeprefix("rp_live_"),
        KEY.replace("rp_live_", "sk-live_"),
        KEY.upper(),
        KEY[:-6],
        KEY * 2,
        pytest.param("rp_live_" + "0" * 100_000, id="far too long"),
        " " + KEY,
        KEY + " ",
        KEY + "\n",
        "\0" * len(KEY),
        "ü" * len(KEY),
        "rp_live_" + "\uff10" * 49,
    ],
)
def test_what_is_no_key_is_told_by_its_look(text: str) -> None:
    assert not well_formed(text)


@given(st.text(st.characters(exclude_categories=()), max_size=80))
@quick
def test_no_text_is_too_odd_to_be_looked_at(text: str) -> None:
    assert not well_formed(text)
    assert not well_formed("rp_live_" + text)


@pytest.mark.parametrize("length", [0, 42, 44, 100])
def test_a_right_checksum_does_not_make_up_for_a_wrong_length(length: int) -> None:
    body = "0" * length
    assert not well_formed(f"rp_live_{body}{spelled(zlib.crc32(body.encode()))}")
    assert well_formed(f"rp_live_{'0' * 43}{spelled(zlib.crc32(b'0' * 43))}")


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} ", f"Bearer {KEY}\t"])
def test_the_key_is_what_follows_bearer_with_or_without_padding(header: str) -> None:
    assert bearer(header) == KEY


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        " ",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Token {KEY}",
        f"Bearer{KEY}",
        f"Bearer: {KEY}",
        f" Bearer {KEY}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY},",
        f'Bearer "{KEY}"',
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}é",
        "Bearer sk-0123456789",
    ],
)
def test_any_other_authorization_holds_no_key(header: str | None) -> None:
    assert bearer(header) is None


def test_what_is_stored_is_the_sha_256() -> None:
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(KEY) == hashlib.sha256(KEY.encode()).hexdigest()
    assert digest(KEY) != digest(KEY[:-1])


def api_key(*, expires_ms: int | None = None, revoked_ms: int | None = None) -> ApiKey:
    return ApiKey(
        id="key_1",
        workspace="ws_1",
        name="ci",
        digest=digest(KEY),
        created_ms=0,
        expires_ms=expires_ms,
        revoked_ms=revoked_ms,
    )


def test_a_key_without_an_end_is_always_valid() -> None:
    assert api_key().valid_at(0)
    assert api_key().valid_at(10**15)


@pytest.mark.parametrize(
    "key",
    [
        api_key(expires_ms=1000),
        api_key(revoked_ms=1000),
        api_key(expires_ms=1000, revoked_ms=5000),
        api_key(expires_ms=5000, revoked_ms=1000),
    ],
)
def test_a_key_is_valid_until_the_millisecond_of_its_first_end(key: ApiKey) -> None:
    assert key.valid_at(999)
    assert not key.valid_at(1000)
    assert not key.valid_at(9000)


def test_only_the_starter_plan_has_no_keys() -> None:
    assert [plan for plan in Plan if not plan.has_keys] == [Plan.STARTER]
