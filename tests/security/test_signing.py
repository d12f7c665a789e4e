"""Signing keys in files."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, UntrustedError
from appliance.security.signing import list_keys, load_key, load_keys, make_key, store_key


def test_a_key_comes_back_as_it_was_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    key = make_key()
    path = store_key(key, tmp_path / "keys", "timestamp")
    assert load_key(path).public == key.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_key_under_a_passphrase_needs_it(tmp_path: Path) -> None:
    key = make_key()
    path = store_key(key, tmp_path, "root", passphrase="correct horse")
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_key(path, passphrase="correct horse").public == key.public
    with pytest.raises(UntrustedError) as refusal:
        load_key(path)
    assert refusal.value.code == "passphrase_needed"
    with pytest.raises(UntrustedError) as refusal:
        load_key(path, passphrase="wrong")
    assert refusal.value.code == "bad_key"


def test_a_passphrase_that_is_not_needed_does_not_matter(tmp_path: Path) -> None:
    key = make_key()
    assert load_key(store_key(key, tmp_path, "root"), passphrase="any").public == key.public


def test_an_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError):
        store_key(make_key(), tmp_path, "root", passphrase="")
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_not_written_over(tmp_path: Path) -> None:
    key = make_key()
    path = store_key(key, tmp_path, "root")
    before = path.read_bytes()
    with pytest.raises(ConflictError):
        store_key(key, tmp_path, "root")
    assert path.read_bytes() == before


def test_a_key_of_another_name_another_kind_or_no_key_is_refused(tmp_path: Path) -> None:
    one, other = (store_key(make_key(), tmp_path, "root") for _ in range(2))
    shutil.copy(one, other)
    with pytest.raises(UntrustedError, match="another key"):
        load_key(other)
    foreign = tmp_path / "foreign.pem"
    foreign.write_bytes(
        generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(UntrustedError, match="no Ed25519 key"):
        load_key(foreign)
    foreign.write_bytes(b"garbage")
    with pytest.raises(UntrustedError, match="cannot be read"):
        load_key(foreign)
    with pytest.raises(NotFoundError):
        load_key(tmp_path / "none.pem")


def test_keys_are_listed_by_their_role(tmp_path: Path) -> None:
    root = store_key(make_key(), tmp_path, "root")
    store_key(make_key(), tmp_path, "targets")
    (tmp_path / "notes.txt").write_text("nothing")
    assert [each.path for each in list_keys([tmp_path, tmp_path / "absent"], "root")] == [root]
    assert {each.role for each in list_keys([tmp_path])} == {"root", "targets"}


def test_a_threshold_of_keys_may_lie_in_several_folders(tmp_path: Path) -> None:
    keys = [make_key() for _ in range(3)]
    for number, key in enumerate(keys[:2]):
        store_key(key, tmp_path / str(number), "root")
    store_key(make_key(), tmp_path / "0", "root")  # nobody's
    folders = [tmp_path / "0", tmp_path / "1"]
    found = load_keys(folders, "root", [each.id for each in keys], 2)
    assert {each.id for each in found} == {each.id for each in keys[:2]}
    with pytest.raises(NotFoundError, match=r"2 of the 3 root keys must sign, and 1 were found") as refusal:
        load_keys(folders[:1], "root", [each.id for each in keys], 2)
    assert refusal.value.code == "keys_missing"
