"""Shares of a master key: any `needed` of them give it, and every mistake is one named error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.vault.shares import (
    Share,
    combine,
    interpolate,
    read_key,
    split,
    write_shares,
)
from modeling.encryption.ised_errors import (
    FormatError,
    InsecurePermissions,
    IsedError,
    KeyringExists,
    StorageError,
    Tampered,
    UsageError,
)
from modeling.encryption.primitives import hmac_sha256

KEY = bytes(range(32))


def test_official_vector_of_slip_0039() -> None:
    """Vector 4, "Basic sharing 2-of-3 (128 bits)": values of its two shares at points 2 and 0.

    The secret is at 255. The point 254 contains its digest: 4 bytes of an HMAC, then the key of the
    HMAC.
    """
    values = {
        2: bytes.fromhex("08fb14b66e692e25dfe2edf53289ed62"),
        0: bytes.fromhex("06ab48fef4bedc8ce58baeef0a73f76e"),
    }
    secret, digest = interpolate(values, 255), interpolate(values, 254)
    assert secret.hex() == "cdc017fddc829e791b1371780be0605a"
    assert hmac_sha256(digest[4:], secret)[:4] == digest[:4]


@pytest.mark.parametrize(("needed", "count"), [(2, 2), (2, 3), (3, 5)])
def test_any_needed_shares_give_the_key(needed: int, count: int) -> None:
    shares = split(KEY, needed, count)
    for size in range(1, count + 1):
        for chosen in combinations(shares, size):
            if size >= needed:
                assert combine(chosen) == KEY
            else:
                with pytest.raises(UsageError, match=f"needs {needed} of its {count} shares"):
                    combine(chosen)


def test_the_largest_number_of_shares() -> None:
    shares = split(KEY, 32, 32)
    assert combine(shares[::-1]) == KEY


def test_fewer_shares_fit_every_key() -> None:
    """For any wrong key there is a value of the missing share that would give it."""
    shares = {share.number: share.value for share in split(KEY, 3, 3)[:2]}
    for wrong in (bytes(32), b"\xff" * 32):
        third = interpolate({**shares, 0: wrong}, 3)
        assert interpolate({**shares, 3: third}, 0) == wrong


def test_two_splits_of_a_key_have_nothing_in_common() -> None:
    first, second = split(KEY, 2, 2), split(KEY, 2, 2)
    assert first[0].set_id != second[0].set_id
    assert first[0].commitment != second[0].commitment
    assert first[0].value != second[0].value
    with pytest.raises(UsageError, match="different sets"):
        combine([first[0], second[1]])


@given(st.binary(min_size=32, max_size=32), st.integers(2, 6), st.integers(0, 3), st.randoms())
@settings(max_examples=20, deadline=None)
def test_files_give_the_key(key: bytes, needed: int, more: int, random: object) -> None:
    shares = split(key, needed, needed + more)
    random.shuffle(shares)  # type: ignore[attr-defined]
    read = [Share.parse(share.to_text().encode(), "file") for share in shares]
    assert read == shares
    assert combine(read[:needed]) == key


@pytest.mark.parametrize(("needed", "count"), [(1, 3), (0, 0), (3, 2), (2, 33), (-1, 5)])
def test_impossible_numbers_are_refused(needed: int, count: int) -> None:
    with pytest.raises(UsageError, match="expected 2 <= needed <= shares <= 32"):
        split(KEY, needed, count)


def test_no_changed_byte_of_a_file_is_accepted() -> None:
    share = split(KEY, 2, 3)[0]
    content = share.to_text().encode()
    for place in range(len(content) - 1):  # the last newline may be missing
        for changed in (content[place] ^ 1, content[place] ^ 0x20, 0x0A, 0x30):
            if changed != content[place]:
                damaged = content[:place] + bytes([changed]) + content[place + 1 :]
                with pytest.raises(FormatError):
                    Share.parse(damaged, "file")


def test_white_space_of_editors_is_accepted() -> None:
    share = split(KEY, 2, 2)[0]
    text = share.to_text()
    for variant in (text.replace("\n", "\r\n"), text + "\n\n", text.rstrip()):
        assert Share.parse(variant.encode(), "file") == share


def test_a_forged_share_with_a_valid_checksum_is_detected() -> None:
    shares = split(KEY, 2, 3)
    forged = replace(shares[0], value=bytes(32))
    with pytest.raises(Tampered, match="shares 1, 3 do not give the key of their set"):
        combine([Share.parse(forged.to_text().encode(), "file"), shares[2]])
    with pytest.raises(Tampered):  # also if other shares would be enough
        combine([shares[1], shares[2], forged])


def test_a_share_that_is_given_twice_is_named() -> None:
    shares = split(KEY, 2, 3)
    with pytest.raises(UsageError, match="share 3 is given twice; give 2 different shares"):
        combine([shares[2], shares[2]])


def test_impossible_numbers_in_a_file_are_refused() -> None:
    for change in ({"number": 4}, {"number": 0}, {"needed": 1}, {"needed": 4}, {"count": 33}):
        share = replace(split(KEY, 2, 3)[0], **change)
        with pytest.raises(FormatError, match="is impossible"):
            Share.parse(share.to_text().encode(), "file")


def test_the_value_is_not_in_the_representation() -> None:
    share = split(KEY, 2, 2)[0]
    assert share.value.hex() not in repr(share)
    assert str(share.value) not in repr(share)


def test_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "shares"
    paths = write_shares(split(KEY, 2, 3), folder)
    assert [path.name for path in paths] == [f"share-{i}-of-3.txt" for i in (1, 2, 3)]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert read_key(paths[1:]) == KEY
    before = [path.read_bytes() for path in paths]
    with pytest.raises(KeyringExists, match="choose an empty folder"):
        write_shares(split(KEY, 2, 3), folder)
    assert [path.read_bytes() for path in paths] == before
    paths[0].chmod(0o644)
    with pytest.raises(InsecurePermissions, match="chmod 600"):
        read_key(paths)


@pytest.mark.parametrize("error", [StorageError("full"), KeyboardInterrupt()])
def test_a_failure_leaves_no_share(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: bytes) -> None:
        if path.name.startswith("share-3"):
            raise error
        path.write_bytes(content)

    monkeypatch.setattr("engine.vault.shares.write_new_private", write)
    with pytest.raises(type(error)):
        write_shares(split(KEY, 2, 3), tmp_path / "shares")
    assert list((tmp_path / "shares").iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"\xff\xfe" * 600),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(KEY),  # the master key file itself
    ],
)
def test_other_files_are_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "x"
    path.touch(0o600)
    make(path)
    with pytest.raises(IsedError, match="is not a share of a master key"):
        read_key([path])


def test_the_checksum_is_the_one_of_the_document() -> None:
    lines = split(KEY, 2, 2)[0].to_text().splitlines(keepends=True)
    assert (
        lines[-1] == f"checksum: {hashlib.sha256(''.join(lines[:-1]).encode()).hexdigest()[:16]}\n"
    )
