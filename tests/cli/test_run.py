"""`run`: questions, conversations, pictures and videos."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capa_export.base.errors import ExitCode
from capa_export.bundle.store import Bundle
from capa_export.model.families import qwen25vl
from capa_export.run.bundled import bundled_bounds, bundled_prompter
from tests.cli.conftest import Cli, preflight
from tests.conftest import noise, recorded


def test_run_answers_from_the_bundle_alone(cli: Cli, spare: Path, pictures: Path) -> None:
    question = ("--prompt", "what color is the star ?", "--image", pictures / "0.png", "--max-new-tokens", 3)
    code, out, err = cli("run", spare, *question)
    assert code == 0 and out.strip() and "kept 16 of 64 visual tokens after layer 2" in err
    code, streamed, _ = cli("run", spare, *question, "--ratio", 0)
    code, out, _ = cli("run", spare, *question, "--ratio", 0, "--json")
    result = json.loads(out)
    assert result["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 64, "visual": 64}]
    assert result["answer"] == streamed.strip()
    assert result["new_tokens"] <= 3
    code, _, err = cli("run", spare, "--prompt", "hello", "--max-new-tokens", 1)
    assert code == 0 and "kept 0 of 0" in err


def test_a_photo_is_seen_as_large_as_the_target_takes(cli: Cli, spare: Path, tmp_path: Path) -> None:
    """A photo of 24 megapixels would be 16,000 visual tokens."""
    Image.new("RGB", (6000, 4000)).save(tmp_path / "photo.png")
    ask = ("run", spare, "--prompt", "what ?", "--image", tmp_path / "photo.png", "--max-new-tokens", 1)
    prompter = bundled_prompter(Bundle.open(spare))
    [picture] = prompter("what ?", [Image.new("RGB", (6000, 4000))]).pictures
    assert picture.grid == (42, 64)
    code, out, err = cli(*ask, "--max-pixels", 100_000, "--json")
    assert code == 0 and err.startswith("visual tokens: 117 (picture of 6000 x 4000); keeping 30 after layer 2; ")
    assert json.loads(out)["stages"][0]["visual"] == 117 <= 100_000 // 28**2
    code, _, err = cli("run", spare, "--prompt", "what ?", "--max-pixels", 5)
    assert code == ExitCode.USAGE and "--max-pixels 5: one visual token is 28 x 28 pixels; give 784 or more" in err
    # Beyond what the target takes, ONNX Runtime sees what it is asked to.
    beyond = 64 * 64 * 28**2 + 1
    limits = bundled_bounds(Bundle.open(spare), None, beyond)
    assert limits.max_rows is None
    code, _, err = cli("run", spare, "--prompt", "what ?", "--min-pixels", beyond)
    assert code == ExitCode.USAGE and "where no engine runs, --max-pixels lifts them" in err
    assert (
        cli("run", spare, "--prompt", "?", "--min-pixels", beyond, "--max-pixels", beyond, "--max-new-tokens", 1)[0]
        == 0
    )
    # A photo is then seen as large as ever.
    assert bundled_bounds(Bundle.open(spare), 9999, None).max_rows == 64
    assert bundled_bounds(Bundle.open(spare), None, None).max_rows == 64


def test_an_answer_keeps_its_tail_and_its_times(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capa_export.model.prompt.Prompter.decode", lambda _self, tokens: "\ufffd" * len(tokens))
    ask = ("run", bundle, "--prompt", "x", "--max-new-tokens", 1)
    assert cli(*ask)[1] == "\ufffd\n"
    result = json.loads(cli(*ask, "--json")[1])
    assert result["decode_ms_per_token"] is None and result["prefill_ms"] == round(result["prefill_ms"], 3)
    parts = [result[f"{part}_ms"] for part in ("processor", "vision", "prefill")]
    assert all(parts) and result["first_token_ms"] == pytest.approx(sum(parts), abs=0.01)
    assert result["answer_ms"] > result["first_token_ms"] and result["pictures_ms"] < result["first_token_ms"]
    cost = cli(*ask)[2].splitlines()[-1]
    assert re.fullmatch(
        r"kept 0 of 0 visual tokens after layer 2; first token after \d+ ms "
        r"\(pictures \d+, processor \d+, vision \d+, prefill \d+\), whole answer after \d+ ms",
        cost,
    )


def test_a_conversation_and_a_video_are_answered(cli: Cli, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    question = {"type": "text", "text": "what color is the star ?"}
    path = tmp_path / "messages.json"

    def ask(*content: dict[str, str]) -> dict[str, Any]:
        turns = [{"role": "user", "content": "what is red ?"}, {"role": "assistant", "content": "the star"}]
        path.write_text(json.dumps([*turns, {"role": "user", "content": [*content, question]}]), encoding="utf-8")
        code, out, err = cli("run", bundle, "--messages", path, "--json", "--max-new-tokens", 2)
        assert (code, err.startswith("visual tokens: ")) == (0, bool(content))
        return json.loads(out)

    assert ask()["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 0, "visual": 0}]
    shown = [{"type": "image", "image": str(pictures / name)} for name in ("0.png", "1.png")]
    assert ask(*shown)["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 25, "visual": 64 + 35}]
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(5):
        noise(112, 84, index).save(frames / f"{index}.png")
    video = ask({"type": "video", "video": "frames"})
    assert video["stages"] == [{"layer": 2, "where": "after layer 2", "kept": 9, "visual": 3 * 4 * 3}]
    options = ("--prompt", question["text"], "--video", frames, "--fps", 2, "--max-new-tokens", 2)
    code, out, err = cli("run", bundle, *options)
    assert code == 0 and out.strip()
    assert err.startswith("visual tokens: 36 (video of 112 x 84); keeping 9 after layer 2; ")
    assert "\nkept 9 of 36 visual tokens after layer 2; first token after " in err


def test_several_conversations_are_answered_as_each_alone(
    cli: Cli, bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    files: list[Path] = []
    for index, names in enumerate([["0.png", "1.png"], [], ["1.png"]]):
        shown = [{"type": "image", "image": str(pictures / name)} for name in names]
        turn = {"role": "user", "content": [*shown, {"type": "text", "text": "what shape is red ?"}]}
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps([turn]), encoding="utf-8")

    def ask(*paths: Path) -> Any:
        options = [word for path in paths for word in ("--messages", path)]
        code, out, _ = cli("run", bundle, *options, "--json", "--max-new-tokens", 4)
        assert code == 0
        return json.loads(out)

    alone, together = [ask(path) for path in files], ask(*files)
    for one, same in zip(alone, together, strict=True):
        assert one["answer"] == same["answer"] and one["stages"] == same["stages"]
    code, out, err = cli("run", bundle, "--messages", files[0], "--messages", files[1], "--max-new-tokens", 4)
    assert code == 0 and out.splitlines() == [one["answer"] for one in alone[:2]] and err.count("kept") == 2


def test_what_run_cannot_take_together_is_one_line(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for options, message in (
        ((), "run needs --prompt, or a conversation in --messages"),
        (("--prompt", "x", "--messages", tmp_path), "--messages holds the whole conversation: it takes no --prompt"),
        (("--prompt", "x", "--fps", 2), "--fps has no effect without --video"),
        (("--messages", tmp_path / "x.json"), "x.json: no such file"),
    ):
        code, out, err = cli("run", bundle, *options)
        assert (code, out) == (ExitCode.USAGE, "") and message in err and err.count("\n") == 1
    preflight(cli, "clip.mp4: no such video", "run", bundle, "--prompt", "x", "--video", tmp_path / "clip.mp4")


def test_conversations_calibrate(cli: Cli, recipe: Path, pictures: Path, tmp_path: Path) -> None:
    first, second, third = ({"type": "image", "image": str(pictures / f"{index}.png")} for index in range(3))
    contents = ([first, second, {"type": "text", "text": "what color is the star ?"}], [third, first])
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ("-m", recipe, "--images", path, "-t", "onnx", "-o", tmp_path / "out", "--json")
    code, out, _ = cli("build", *options)
    parity = json.loads(out)
    assert code == 0, parity["failures"]
    assert parity["prompts"] == f"2 conversations of {path}"
    assert "Only 2 different conversations for 4 prompts: give as many in --images." in parity["warnings"]
    path.write_text("{}\n", encoding="utf-8")
    preflight(cli, "samples.jsonl: line 1: has neither messages nor an image and a question", "build", *options)


def test_an_answer_ends_with_the_context(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoders whose rotary frequencies are others from a length on."""
    ask = ("run", bundle, "--prompt", "what color is the star ?", "--max-new-tokens", 8, "--json")
    monkeypatch.setattr("capa_export.run.answer.eos_token_ids", lambda _folder: [])
    unlimited = json.loads(cli(*ask)[1])
    assert unlimited["new_tokens"] == 8
    limits = [unlimited["prompt_tokens"] + 2, unlimited["prompt_tokens"] - 1]
    model_dims = qwen25vl.model_dims

    def limited(config: dict[str, Any], **where: str) -> Any:
        dims = model_dims(config, **where)
        return replace(dims, decoder=replace(dims.decoder, rope_limit=limits[0]))

    monkeypatch.setattr("capa_export.model.families.qwen25vl.model_dims", limited)
    # The last token is not fed back: three of them end at the limit.
    assert json.loads(cli(*ask)[1])["new_tokens"] == 3
    del limits[0]
    preflight(cli, f"more than the {limits[0]} of this decoder's context; use fewer or smaller pictures", *ask)


def configured(bundle: Path, **settings: Any) -> Path:
    """The bundle of a checkpoint whose generation config says this too."""
    path = bundle / "onnx" / "llm" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}), encoding="utf-8")
    recorded(Bundle.open(bundle))
    return bundle


def test_an_answer_is_generated_as_the_checkpoint_asks(cli: Cli, spare: Path, pictures: Path) -> None:
    ask = ("--prompt", "what color is the star ?", "--image", pictures / "1.png")
    plain = json.loads(cli("run", spare, *ask, "--json", "--max-new-tokens", 9)[1])
    stop = plain["generation"].pop("eos_token_id")
    assert plain["generation"] == {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 9}
    configured(spare, do_sample=True, temperature=1.7, top_p=0.95, max_new_tokens=9, num_beams=3, use_cache=True)
    code, out, err = cli("run", spare, *ask, "--json")
    sampled = json.loads(out)
    assert code == 0
    said = [line for line in err.splitlines() if not line.startswith("visual tokens: ")]
    assert len(said) == 1 and said[0].endswith("generation_config.json: not supported, and without effect: num_beams 3")
    seed = sampled["generation"]["seed"]
    assert sampled["generation"] == {
        "do_sample": True,
        "temperature": 1.7,
        "top_p": 0.95,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "seed": seed,
        "max_new_tokens": 9,
        "eos_token_id": stop,
    }
    code, out, err = cli("run", spare, *ask, "--seed", seed)
    assert out.strip() == sampled["answer"].strip() and err.endswith(f"; sampled with --seed {seed}\n")
    assert len({cli("run", spare, *ask, "--seed", other)[1] for other in range(4)}) > 1
    assert json.loads(cli("run", spare, *ask, "--greedy", "--json")[1])["answer"] == plain["answer"]
    penalized = json.loads(cli("run", spare, *ask, "--greedy", "--repetition-penalty", 3, "--json")[1])
    assert penalized["answer"] != plain["answer"] and penalized["generation"]["repetition_penalty"] == 3


def test_options_of_generation_contradict_nothing(cli: Cli, bundle: Path) -> None:
    ask = ("run", bundle, "--prompt", "x")
    for options, message in (
        (("--greedy", "--temperature", 0.5), "--greedy takes the likeliest token, where --temperature has no effect"),
        (("--temperature", 0), "--temperature must be above 0, not 0.0"),
        (("--top-p", 1.1), "--top-p must be above 0 and at most 1, not 1.1"),
        (("--seed", 1), "--seed has no effect where the likeliest token is taken"),
        (("--max-new-tokens", 0), "--max-new-tokens must be 1 or more, not 0"),
    ):
        code, out, err = cli(*ask, *options)
        assert (code, out) == (ExitCode.USAGE, "") and message in err and err.count("\n") == 1


def test_a_broken_generation_config_is_one_line(cli: Cli, spare: Path) -> None:
    ask = ("run", configured(spare, temperature="hot"), "--prompt", "x")
    preflight(cli, "generation_config.json: temperature: Input should be a valid number", *ask)
    configured(spare, temperature=float("nan"))
    preflight(cli, "generation_config.json: temperature: Input should be a finite number", *ask)
    configured(spare, temperature=0, do_sample=True)
    preflight(cli, "temperature must be above 0, not 0.0; --temperature goes in its place", *ask)
    assert cli(*ask, "--temperature", 1, "--max-new-tokens", 1)[0] == 0
