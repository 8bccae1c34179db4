"""Labels that look the same are one subject, also in keyrings from before this rule."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.vault import keyring_admin, subjects
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject, import_subject
from engine.vault.master import KeyFile, Passphrase
from engine.vault.subjects import checked_label, normalized, spellings
from modeling.encryption.ised_errors import BadInput, DestroyedKey, RevokedKey
from tests.fixtures.keyrings import CHEAP, to_format
from utils.files import composed

# A Vietnamese name: composed, decomposed, and as Vietnamese keyboards type it, which is neither.
NFC, NFD, MIXED = "set/Hi\u1ebfn", "set/Hie\u0302\u0301n", "set/Hi\u00ea\u0301n"
SPELLINGS = (NFC, NFD, MIXED)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "keys.db", KeyFile(tmp_path / "master.key"))


def _as_before(keyring: Keyring, *labels: str) -> list[bytes]:
    """Make keys the way they were made before labels were normalised; return their ids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "normalized", lambda text: text)
        patch.setattr(subjects, "spellings", lambda label: [label])
        patch.setattr("engine.vault.keyring.spellings", lambda label: [label])
        patch.setattr(Keyring, "_old_tags", lambda self: {})
        key_ids = [keyring.sealing_key(label).key_id for label in labels]
    to_format(1, keyring)
    return key_ids


def _listed(keyring: Keyring, subject: str | None = None) -> list[tuple[str | None, int, str]]:
    infos = keyring_admin.list_keys(keyring, subject)
    return [(info.subject, info.generation, info.state) for info in infos]


def test_all_spellings_of_a_name_are_one_subject(keyring: Keyring) -> None:
    assert len({keyring.sealing_key(label).key_id for label in SPELLINGS}) == 1
    keyring.ensure(SPELLINGS)
    assert _listed(keyring) == [(NFC, 1, "active")]


@pytest.mark.parametrize("stored", SPELLINGS)
@pytest.mark.parametrize("asked", SPELLINGS)
def test_an_old_key_is_found_by_every_spelling(
    keyring: Keyring, stored: str, asked: str, tmp_path: Path
) -> None:
    (before,) = _as_before(keyring, stored)
    keyring.close()
    with Keyring.open(tmp_path / "keys.db", KeyFile(tmp_path / "master.key")) as again:
        assert again.sealing_key(asked).key_id == before
        again.ensure(SPELLINGS)
        assert _listed(again, asked) == _listed(again) == [(stored, 1, "active")]
        keyring_admin.rotate(again, asked)
        assert _listed(again) == sorted([(stored, 1, "retired"), (NFC, 2, "active")])
        assert keyring_admin.revoke(again, asked) == 2
        with pytest.raises(RevokedKey):
            again.sealing_key(asked)


def test_old_keys_of_two_spellings_belong_to_one_subject(keyring: Keyring) -> None:
    composed_key, decomposed_key = _as_before(keyring, NFC, NFD)
    assert composed_key != decomposed_key
    for label in SPELLINGS:
        assert keyring.sealing_key(label).key_id == composed_key
    assert _listed(keyring, MIXED) == [(NFD, 1, "active"), (NFC, 1, "active")]
    assert keyring_admin.revoke(keyring, NFD) == 2
    assert keyring_admin.restore(keyring, NFC) == 2
    assert sorted(row[2] for row in _listed(keyring)) == ["active", "retired"]


@pytest.mark.parametrize("stored", SPELLINGS)
def test_destroy_reaches_every_spelling(keyring: Keyring, stored: str, tmp_path: Path) -> None:
    _as_before(keyring, stored, "set/other")
    assert keyring_admin.destroy(keyring, NFC) == 1
    assert _listed(keyring, NFC) == _listed(keyring, stored) == [(None, 1, "destroyed")]
    with Keyring.open(tmp_path / "keys.db", KeyFile(tmp_path / "master.key")) as again:
        for label in SPELLINGS:
            for opened in (keyring, again):
                with pytest.raises(DestroyedKey):
                    opened.sealing_key(label)
        assert again.sealing_key("set/other").key_id


def test_an_old_tombstone_is_found_by_composed_and_decomposed_labels(
    keyring: Keyring, tmp_path: Path
) -> None:
    _as_before(keyring, NFD)
    with pytest.MonkeyPatch.context() as patch:  # old tombstones kept the tag of the label
        patch.setattr(Keyring, "subject_tag", lambda self, subject: self._tag(NFD))
        keyring_admin.destroy(keyring, NFD)
    with Keyring.open(tmp_path / "keys.db", KeyFile(tmp_path / "master.key")) as again:
        for label in SPELLINGS:
            with pytest.raises(DestroyedKey):
                again.sealing_key(label)


def test_an_export_is_imported_under_the_composed_label(keyring: Keyring, tmp_path: Path) -> None:
    phrase = Passphrase("for the court", CHEAP)
    _as_before(keyring, NFD)
    assert export_subject(keyring, NFC, tmp_path / "one.keys", phrase) == 1
    with Keyring.create(tmp_path / "b.db", KeyFile(tmp_path / "b.key")) as other:
        import_subject(other, tmp_path / "one.keys", phrase)
        assert _listed(other, NFD) == [(NFC, 1, "retired")]


@settings(max_examples=25)
@given(st.text(min_size=1, max_size=40).filter(lambda text: normalized(text) and "\0" not in text))
def test_labels_in_any_unicode_form_are_equal(text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert {checked_label(form) for form in (text, *forms)} == {normalized(text)}
    assert normalized(normalized(text)) == normalized(text)
    assert set(spellings(text)) == {normalized(text), text, *forms}
    assert spellings(text)[0] == normalized(text)


BLANKS = [
    "set/anna ",
    "set/ anna",
    "set/an\u200bna",
    "set/anna\ufeff",
    "set/anna\u00a0",
    "set /anna",
]


@pytest.mark.parametrize("label", BLANKS)
def test_blanks_at_the_ends_and_invisible_characters_make_no_other_subject(
    keyring: Keyring, label: str
) -> None:
    key_id = keyring.sealing_key("set/anna").key_id
    assert keyring.sealing_key(label).key_id == key_id
    assert keyring.sealing_key("set/an na").key_id != key_id


@pytest.mark.parametrize("stored", BLANKS)
def test_old_keys_of_labels_with_blanks_belong_to_the_subject(
    keyring: Keyring, stored: str
) -> None:
    (old,) = _as_before(keyring, stored)
    assert keyring.sealing_key("set/anna").key_id == keyring.sealing_key(stored).key_id == old
    assert keyring_admin.destroy(keyring, "set/anna") == 1
    for label in ("set/anna", stored):
        with pytest.raises(DestroyedKey):
            keyring.sealing_key(label)


@pytest.mark.parametrize("label", ["", " ", "\u200b", "a\0b", "\udcff"])
def test_invalid_labels_are_rejected(label: str) -> None:
    for check in (spellings, checked_label):
        with pytest.raises(BadInput, match="subject label"):
            check(label)


@pytest.mark.parametrize("label", ["x" * 1025, "\u1ebf" * 342])
def test_a_label_that_is_too_long_gets_no_key(keyring: Keyring, label: str) -> None:
    with pytest.raises(BadInput, match="subject label of 102. bytes"):
        keyring.check_subject(label)
    with pytest.raises(BadInput, match="subject label of 102. bytes"):
        keyring.sealing_key(label)
    assert _listed(keyring) == []


@pytest.mark.parametrize("odd", ["\u212a", "\u037e", "\u1fef"])  # kelvin, Greek ; and accent
def test_an_old_label_that_composes_to_ascii_is_found(keyring: Keyring, odd: str) -> None:
    label = f"x/{odd}1"
    assert composed(label).isascii()
    _as_before(keyring, label)
    assert _listed(keyring, composed(label)) == [(label, 1, "active")]
    keyring.sealing_key("x/2")  # reads the file again
    assert keyring_admin.destroy(keyring, composed(label)) == 1
    for spelling in (label, composed(label)):
        with pytest.raises(DestroyedKey):
            keyring.sealing_key(spelling)


def test_an_old_key_with_a_label_that_grows_when_composed_can_be_revoked_and_destroyed(
    keyring: Keyring,
) -> None:
    label = "\u0958" * 341  # 1023 bytes; twice as many when composed
    (before,) = _as_before(keyring, label)
    keyring.check_subject(label)
    assert keyring.sealing_key(label).key_id == before
    assert keyring_admin.revoke(keyring, label) == 1
    with pytest.raises(RevokedKey):
        keyring.sealing_key(label)
    with pytest.raises(BadInput, match="subject label of 2046 bytes"):
        keyring_admin.rotate(keyring, label)  # a new key needs a label that fits
    assert keyring_admin.destroy(keyring, composed(label)) == 1
    with pytest.raises(DestroyedKey):
        keyring.sealing_key(label)
