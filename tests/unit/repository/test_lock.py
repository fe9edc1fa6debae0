"""Hashes in the locks, made of what pip said (recorded)."""

import runpy

import pytest

LOCK = runpy.run_path("deploy/lock.py")
FILES = "https://files.pythonhosted.org/packages/x"
ABSL = ("absl_py-2.5.1-py3-none-any.whl", "a" * 64)
NEW = ("cryptography-50.0.2-cp311-abi3-manylinux_2_34_x86_64.whl", "b" * 64)
OLD = ("cryptography-50.0.2-cp311-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", "c" * 64)
TEXT = """# What it is for
absl-py==2.5.1
Crypto_graphy==50.0.2 --hash=sha256:{old}  # pinned
""".format(old="d" * 64)


def report(**files: tuple[str, str]) -> dict:
    """As `pip install --dry-run --report` writes it."""
    install = [
        {
            "metadata": {"name": name, "version": "1"},
            "download_info": {
                "url": f"{FILES}/{file}",
                "archive_info": {"hash": f"sha256={digest}", "hashes": {"sha256": digest}},
            },
        }
        for name, (file, digest) in files.items()
    ]
    return {"version": "1", "install": install}


def test_names_and_versions_of_a_lock_are_read_with_and_without_hashes():
    assert LOCK["pins"](TEXT) == {"absl-py": "2.5.1", "Crypto_graphy": "50.0.2"}


def test_a_lock_keeps_its_versions_and_gets_the_hash_of_every_file_once():
    files, hashed = LOCK["files"], LOCK["hashed"]
    here = files(report(absl_py=ABSL, **{"crypto.graphy": NEW}))
    oldest = files(report(absl_py=ABSL, **{"crypto.graphy": OLD}))
    assert here == {"absl-py": ABSL, "crypto-graphy": NEW}
    written = hashed(TEXT, [here, oldest])
    assert written.splitlines() == [
        "# What it is for",
        f"absl-py==2.5.1 --hash=sha256:{'a' * 64}",
        f"Crypto_graphy==50.0.2 --hash=sha256:{'b' * 64} --hash=sha256:{'c' * 64}",
    ]
    assert hashed(written, [here, oldest]) == written
    assert LOCK["pins"](written) == LOCK["pins"](TEXT)


def test_sources_that_give_different_files_are_named_and_get_no_hash():
    files, disagreements = LOCK["files"], LOCK["disagreements"]
    here = files(report(absl_py=ABSL, cryptography=NEW))
    assert disagreements(here, files(report(absl_py=ABSL, cryptography=NEW))) == []
    other = (NEW[0], "e" * 64)
    [same_name] = disagreements(here, files(report(absl_py=ABSL, cryptography=other)))
    assert same_name.startswith("cryptography: ")
    assert "e" * 64 in same_name
    [missing] = disagreements(here, files(report(cryptography=NEW)))
    assert missing.startswith("absl-py: ")
    assert "missing on PyPI" in missing


def test_a_file_without_a_hash_is_named():
    plain = report(absl_py=ABSL)
    plain["install"][0]["download_info"]["archive_info"] = {}
    with pytest.raises(SystemExit, match=r"absl_py: .*absl_py-2.5.1.* without a SHA-256"):
        LOCK["files"](plain)
