"""Signed bundles and kits: what a key refuses, what may change a signed folder, and that openssl agrees."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

import capa_export
from capa_export import CapaError
from capa_export.api.stages import export
from capa_export.base.errors import ExitCode
from capa_export.bundle.manifest import encode_manifest
from capa_export.bundle.replacement import COMMIT
from capa_export.bundle.signature import signature_of
from capa_export.bundle.store import MANIFEST, Bundle, file_digest
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.study.tune.recipe_file import write_recipe
from capa_export.trt.kit_file import KIT
from tests.conftest import noise

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
OPENSSL = shutil.which("openssl") or "openssl"
TEMPLATE = "onnx/llm/chat_template.jinja"


def write_key(folder: Path, name: str, key: Any, password: bytes | None = None) -> Path:
    """Both halves of a key in PEM; returns the private one's file."""
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = folder / name
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    private.with_suffix(".pub").write_bytes(public)
    return private


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        write_key(folder, name, ed25519.Ed25519PrivateKey.generate())
    write_key(folder, "encrypted", ed25519.Ed25519PrivateKey.generate(), b"secret")
    write_key(folder, "rsa", rsa.generate_private_key(65537, 2048))
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    (folder / "cut").write_bytes((folder / "own").read_bytes()[:60])
    (folder / "folder").mkdir()
    return folder


@pytest.fixture(scope="module")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a bundle of a small model, whose FFNs stay as they are, so that it needs no calibration."""
    data = load_recipe("qwen25vl").model_dump()
    data |= {"checkpoint": str(checkpoint), "prune": {"schedule": [{"layer": 1, "ratio": 0.75}]}}
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    write_recipe(path, Recipe(**data), "")

    def build(ratio: float, out: Path | None = None, **options: Any) -> Path:
        out = out or tmp_path_factory.mktemp("bundle") / "out"
        export(str(checkpoint), out=out, recipe=str(path), schedule=f"capa@1:{ratio}/full", **options)
        return out

    return build


@pytest.fixture(scope="module")
def signed(build: Callable[..., Path], keys: Path) -> Path:
    return build(0.75, sign=keys / "own")


@pytest.fixture
def spare(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(signed, tmp_path / "spare"))


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line in which a command refuses."""

    def refuse(*command: object, code: int = ExitCode.PREFLIGHT) -> str:
        capfd.readouterr()
        assert main([str(word) for word in command]) == code
        captured = capfd.readouterr()
        assert not captured.out
        [line] = captured.err.splitlines()
        return line

    return refuse


@pytest.fixture
def question(tmp_path: Path) -> tuple[str, ...]:
    noise(112, 84).save(tmp_path / "0.png")
    return ("--prompt", "what ?", "--image", str(tmp_path / "0.png"), "--max-new-tokens", "1")


def forge(bundle: Path, file: str = TEMPLATE) -> None:
    """Change a file, and every digest with it."""
    path = bundle / file
    path.write_bytes(path.read_bytes() + b"\n")
    manifest = Bundle(bundle).manifest
    for record in manifest["stages"].values():
        if file in record["files"]:
            record["files"][file] = file_digest(path)
    (bundle / MANIFEST).write_bytes(encode_manifest(manifest))


def openssl(*words: object, cwd: Path | None = None) -> int:
    return subprocess.run([OPENSSL, *map(str, words)], cwd=cwd, check=False, capture_output=True).returncode


def openssl_verifies(path: Path, public_key: Path) -> bool:
    given = ("-rawin", "-in", path, "-sigfile", signature_of(path))
    return not openssl("pkeyutl", "-verify", "-pubin", "-inkey", public_key, *given)


def test_a_signed_bundle_is_taken(spare: Path, keys: Path, question: tuple[str, ...]) -> None:
    key = ("--verify-key", str(keys / "own.pub"))
    for command in (("inspect", str(spare)), ("run", str(spare), *question), ("doctor", str(spare), "-t", "onnx")):
        assert main([*command, *key]) == ExitCode.OK
    assert len(signature_of(spare / MANIFEST).read_bytes()) == 64
    # A key is asked for, not demanded.
    assert main(["inspect", str(spare)]) == ExitCode.OK


def commands(bundle: Path, other: Path, question: tuple[str, ...], folder: Path) -> list[tuple[object, ...]]:
    return [
        ("inspect", bundle),
        ("doctor", bundle),
        ("run", bundle, *question),
        ("validate", bundle),
        ("engine", bundle, "-t", "orin"),
        ("evaluate", bundle, "--data", folder, "--out", folder / "out"),
        ("explain", bundle, *question[:4]),
        ("compare", bundle, other),
        ("compare", other, bundle),
    ]


def test_digests_that_fit_a_change_are_refused_by_every_command(
    signed: Path, spare: Path, keys: Path, question: tuple[str, ...], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    forge(spare)
    assert main(["inspect", str(spare)]) == ExitCode.OK
    for command in commands(spare, signed, question, tmp_path):
        said = refusal(*command, "--verify-key", keys / "own.pub")
        assert said.startswith(f"error: {spare / MANIFEST}: its signature is not one of {keys / 'own.pub'}: "), command
    assert not (tmp_path / "out").exists()


def test_nothing_of_a_bundle_is_read_before_its_signature(spare: Path, keys: Path, refusal: Callable[..., str]) -> None:
    (spare / MANIFEST).write_text("[" * 10**5)
    assert "its signature is not one of" in refusal("inspect", spare, "--verify-key", keys / "own.pub")


def test_a_signature_of_another_bundle(
    spare: Path, build: Callable[..., Path], keys: Path, refusal: Callable[..., str]
) -> None:
    other = build(0.5, sign=keys / "own")
    shutil.copyfile(signature_of(other / MANIFEST), signature_of(spare / MANIFEST))
    assert "another key signed it, or it was changed" in refusal("inspect", spare, "--verify-key", keys / "own.pub")


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(10**6)])
def test_what_is_no_signature(spare: Path, keys: Path, refusal: Callable[..., str], signature: bytes) -> None:
    signature_of(spare / MANIFEST).write_bytes(signature)
    assert "its signature is not one of" in refusal("inspect", spare, "--verify-key", keys / "own.pub")


def test_a_signature_that_is_missing_or_leads_elsewhere(
    spare: Path, keys: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    signature = signature_of(spare / MANIFEST)
    signature.rename(tmp_path / "signature")
    said = refusal("inspect", spare, "--verify-key", keys / "own.pub")
    assert said == (
        f"error: {spare / MANIFEST}: not signed, and {keys / 'own.pub'} is to have signed it (there is none: "
        "capa_manifest.json.sig)"
    )
    signature.symlink_to(tmp_path / "signature")
    assert "is a link that leads outside" in refusal("inspect", spare, "--verify-key", keys / "own.pub")


def test_an_interrupted_change_of_what_was_signed_is_not_finished(
    spare: Path, keys: Path, refusal: Callable[..., str]
) -> None:
    (spare / COMMIT).mkdir()
    (spare / COMMIT / MANIFEST).write_text("{}")
    assert "a change of what was signed was interrupted" in refusal("inspect", spare, "--verify-key", keys / "own.pub")
    assert (spare / COMMIT / MANIFEST).is_file()


def test_another_key(spare: Path, keys: Path, refusal: Callable[..., str]) -> None:
    assert f"not one of {keys / 'other.pub'}" in refusal("inspect", spare, "--verify-key", keys / "other.pub")


def test_with_a_key_a_time_that_was_set_back_hides_no_change(
    spare: Path, keys: Path, question: tuple[str, ...], refusal: Callable[..., str]
) -> None:
    path, long_ago = spare / TEMPLATE, 10**18
    os.utime(path, ns=(long_ago, long_ago))
    assert main(["inspect", str(spare)]) == ExitCode.OK
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, ns=(long_ago, long_ago))
    assert main(["inspect", str(spare)]) == ExitCode.OK, "its stamp is the same"
    said = refusal("run", spare, *question, "--verify-key", keys / "own.pub")
    assert f"{path}: missing or changed" in said


PUBLIC = "no public key in PEM; `openssl pkey -in KEY -pubout -out PUB` writes one"
PRIVATE = "no private key in PEM; `openssl genpkey -algorithm ed25519 -out KEY` writes one"


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--verify-key", "rsa.pub", "a public key, but not of Ed25519; `openssl pkey"),
        ("--verify-key", "own", PUBLIC),
        ("--verify-key", "garbage", PUBLIC),
        ("--verify-key", "empty", PUBLIC),
        ("--verify-key", "folder", "Is a directory; name the file of a public key"),
        ("--verify-key", "none", "No such file or directory; name the file of a public key"),
        ("--sign", "rsa", "a private key, but not of Ed25519; `openssl genpkey"),
        ("--sign", "encrypted", "is encrypted; `openssl pkey -in "),
        ("--sign", "own.pub", PRIVATE),
        ("--sign", "garbage", PRIVATE),
        ("--sign", "cut", PRIVATE),
        ("--sign", "folder", "Is a directory; name the file of a private key"),
        ("--sign", "none", "No such file or directory; name the file of a private key"),
    ],
)
def test_files_that_are_no_key(
    signed: Path, keys: Path, refusal: Callable[..., str], option: str, name: str, reason: str
) -> None:
    assert f"error: {keys / name}: {reason}" in refusal("validate", signed, option, keys / name)


@pytest.mark.parametrize(("option", "name"), [("--verify-key", "own.pub"), ("--sign", "own")])
def test_a_key_in_the_bundle(spare: Path, keys: Path, refusal: Callable[..., str], option: str, name: str) -> None:
    key = shutil.copyfile(keys / name, spare / "key.pem")
    assert f"{key}: lies in {spare}: whoever" in refusal("engine", spare, option, key)


def test_keys_without_cryptography(
    signed: Path, keys: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    said = refusal("inspect", signed, "--verify-key", keys / "own.pub")
    assert 'signatures need cryptography: pip install ".[sign]"' in said


def test_a_signed_bundle_changes_only_where_it_is_signed_again(
    spare: Path, keys: Path, refusal: Callable[..., str]
) -> None:
    kit = ("engine", str(spare), "-t", "orin", "--plugins", "none")
    before = sorted(spare.rglob("*"))
    assert f"{spare}: is signed, and this would change it; sign it again with --sign KEY" in refusal(*kit)
    assert sorted(spare.rglob("*")) == before
    assert main(["inspect", str(spare), "--verify-key", str(keys / "own.pub")]) == ExitCode.OK
    assert f"not one of {keys / 'other'}:" in refusal(*kit, "--sign", keys / "other")

    assert main([*kit, "--sign", str(keys / "own")]) == ExitCode.OK
    opened = capa_export.open(spare, verify_key=keys / "own.pub")
    assert "engine/orin" in opened.manifest["stages"]
    assert openssl_verifies(spare / MANIFEST, keys / "own.pub")
    assert openssl_verifies(spare / "engines/orin" / KIT, keys / "own.pub")
    assert not openssl_verifies(spare / MANIFEST, keys / "other.pub")
    # A new export takes the kit away, with all that is its own.
    copy = Bundle(Path(shutil.copytree(spare, spare.with_name("copy"))), signing=True)
    copy.run_stage("export", "another", [], lambda _: {}, outdates=["engine/"])
    assert not (copy.folder / "engines").exists()
    # What is current changes nothing.
    assert main(list(kit)) == ExitCode.OK
    assert openssl_verifies(spare / MANIFEST, keys / "own.pub")
    # From hand to hand.
    assert main([*kit, "--verify-key", str(keys / "own.pub"), "--sign", str(keys / "other")]) == ExitCode.OK
    assert openssl_verifies(spare / MANIFEST, keys / "other.pub")
    with pytest.raises(CapaError, match=r"its signature is not one of .*own\.pub"):
        opened.load()


@pytest.mark.slow
def test_only_what_is_fit_to_ship_is_signed(
    build: Callable[..., Path], keys: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Random weights answer otherwise when tokens are gone."""
    bundle = Path(shutil.copytree(build(0.9), tmp_path / "bundle"))
    noise(112, 84).save(tmp_path / "0.png")
    validate = ["validate", str(bundle), "--images", str(tmp_path / "0.png"), "--samples", "1"]
    validate += ["--sign", str(keys / "own")]
    assert main(["engine", str(bundle), "--target", "orin", "--sign", str(keys / "own")]) == ExitCode.OK
    kit = signature_of(bundle / "engines" / "orin" / KIT)
    assert kit.exists()
    assert main(validate) == ExitCode.METHOD
    assert "signature     none: the bundle is not fit to ship" in capfd.readouterr().err
    assert not signature_of(bundle / MANIFEST).exists() and not kit.exists()
    assert main([*validate, "--accept-method-loss"]) == ExitCode.OK
    assert capa_export.open(bundle, verify_key=keys / "own.pub").parity.fit
    (bundle / "parity.json").write_bytes((bundle / "parity.json").read_bytes() + b"\n")
    with pytest.raises(CapaError, match=r"parity\.json: missing or changed"):
        _ = capa_export.open(bundle).parity


def test_weights_in_place_are_read_where_they_are_signed(
    build: Callable[..., Path], keys: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """And where a bundle that was not signed never had them read, that is said before the work."""
    options = {"in_place": True, "precision": "fp32"}
    unread = build(0.75, **options)
    for command in (("engine", unread, "--target", "orin"), ("validate", unread, "--samples", 1)):
        said = refusal(*command, "--sign", keys / "own")
        assert "cannot be signed, since onnx/llm/weights/" in said and said.endswith("export it again, with --sign")
    assert not (unread / "engines").exists()
    signed = build(0.75, **options, sign=keys / "own")
    assert openssl_verifies(signed / MANIFEST, keys / "own.pub")
    again = Path(shutil.copytree(unread, tmp_path / "again"))
    build(0.75, **options, sign=keys / "own", out=again)
    for bundle in (signed, again):
        capa_export.open(bundle, verify_key=keys / "own.pub").load()
        assert all(link["sha256"] for link in Bundle.open(bundle).stage("export")["linked"].values())


def test_what_is_signed_says_which_packages_made_it(signed: Path) -> None:
    bill = Bundle.open(signed).stage("export")["result"]["sbom"]
    made_by = {component["name"]: component["version"] for component in bill["components"]}
    assert {name: made_by[name] for name in ("onnx", "torch")} == {name: version(name) for name in ("onnx", "torch")}


def test_keys_and_signatures_of_openssl(spare: Path, tmp_path: Path) -> None:
    assert not openssl("genpkey", "-algorithm", "ed25519", "-out", "KEY", cwd=tmp_path)
    assert not openssl("pkey", "-in", "KEY", "-pubout", "-out", "PUB", cwd=tmp_path)
    path, signature = spare / MANIFEST, signature_of(spare / MANIFEST)
    ours = signature.read_bytes()
    assert not openssl("pkeyutl", "-sign", "-inkey", tmp_path / "KEY", "-rawin", "-in", path, "-out", signature)
    assert signature.read_bytes() != ours
    assert main(["inspect", str(spare), "--verify-key", str(tmp_path / "PUB")]) == ExitCode.OK


@pytest.fixture(scope="module")
def kit(signed: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(signed, tmp_path_factory.mktemp("kit") / "bundle"))
    opened = capa_export.open(bundle, verify_key=keys / "own.pub")
    opened.build_engines("orin", plugins="none", sign=keys / "own")
    return bundle / "engines/orin"


def changed_code(kit: Path) -> None:
    (kit / "builder.py").write_text("print('pwned')")


def added_module(kit: Path) -> None:
    (kit / "json.py").write_text("print('pwned')")


def added_package(kit: Path) -> None:
    (kit / "elsewhere").mkdir()
    (kit / "json").symlink_to("elsewhere")


def changed_kit(kit: Path) -> None:
    path = kit / KIT
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def as_it_was(_kit: Path) -> None:
    pass


@pytest.mark.parametrize("change", [as_it_was, changed_code, added_module, added_package, changed_kit])
def test_a_kit_is_checked_with_openssl_before_its_code_runs(
    kit: Path, keys: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """By the commands of the docs."""
    [block] = re.findall(r"```sh\n(openssl pkeyutl -verify .*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    copy = Path(shutil.copytree(kit, tmp_path / "kit"))
    change(copy)
    script = block.replace("PUB", str(keys / "own.pub")).replace("./build.sh", "echo builds")
    run = subprocess.run(["/bin/sh", "-c", script], cwd=copy, check=False, capture_output=True, text=True)
    assert ("builds" in run.stdout) == (change is as_it_was), run.stderr
    assert "pwned" not in run.stdout


def test_a_kit_on_its_device(kit: Path, keys: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    build = ("engine", kit, "--on-device")
    key = ("--verify-key", keys / "own.pub")
    assert f"{kit.parents[1]}: is signed, and this would change it" in refusal(*build, *key)
    alone = shutil.copytree(kit, tmp_path / "kit")
    assert "lies in no bundle" in refusal("engine", alone, "--on-device", "--sign", keys / "own", code=ExitCode.USAGE)
    # It is the device that is another.
    assert "signature" not in refusal("engine", alone, "--on-device", *key, code=ExitCode.ENGINE)
    changed_kit(alone)
    assert f"{alone / KIT}: its signature is not one of" in refusal("engine", alone, "--on-device", *key)
    signature_of(alone / KIT).unlink()
    assert f"{alone / KIT}: not signed, and" in refusal("engine", alone, "--on-device", *key)
