"""Keys: made once, readable by the owner only, never overwritten; every wrong file is named in one line."""

from pathlib import Path

import pytest

from qcore.errors import ReleaseError
from qcore.release.keys import create_keys, load_keys, load_signer


def test_a_ring_has_every_role_and_comes_back_the_same(tmp_path: Path) -> None:
    made = create_keys(tmp_path / "keys", ["stable", "beta"])
    loaded = load_keys(tmp_path / "keys")
    assert {n: s.public_key for n, s in loaded.signers.items()} == {n: s.public_key for n, s in made.signers.items()}
    assert len(loaded.root) == 3
    assert loaded.channels == ("beta", "stable")
    assert len({s.public_key.keyid for s in loaded.signers.values()}) == 9


def test_private_keys_are_for_the_owner_and_marked_as_development_keys(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys", ["stable"])
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "keys").glob("*.pem")} == {0o600}
    assert "DEVELOPMENT KEYS" in (tmp_path / "keys" / "README.txt").read_text()


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path, ["stable"])
    before = (tmp_path / "root1.pem").read_bytes()
    with pytest.raises(ReleaseError, match=r"root1\.pem exists"):
        create_keys(tmp_path, ["beta"])
    assert (tmp_path / "root1.pem").read_bytes() == before
    assert not (tmp_path / "channel-beta.pem").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_not_a_private_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gate.pem").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"gate\.pem is not an unencrypted PEM private key"):
        load_signer(tmp_path / "gate.pem")


def test_missing_file_and_missing_role_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"gate\.pem cannot be read: No such file"):
        load_signer(tmp_path / "gate.pem")
    with pytest.raises(ReleaseError, match="no signing keys in"):
        load_keys(tmp_path)
    create_keys(tmp_path, ["stable"])
    (tmp_path / "publisher.pem").unlink()
    with pytest.raises(ReleaseError, match=r"publisher\.pem is missing; held: ") as e:
        load_keys(tmp_path).signer("publisher")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", "../x", "Stable", "a/b", ".hidden", "x.", "a..b", "x" * 65, "é"])
def test_channel_names_that_are_not_safe_in_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReleaseError, match=r"channel .* is not allowed"):
        create_keys(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()
