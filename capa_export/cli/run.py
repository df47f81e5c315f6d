"""The command that asks a bundle."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from capa_export.base.errors import harmless
from capa_export.cli.options import (
    GENERATION,
    PRUNING,
    QUESTIONS,
    BundleArg,
    EngineOpt,
    JsonOpt,
    MaxPixelsOpt,
    MinPixelsOpt,
    ProviderOpt,
    TrustOpt,
    VerifyKeyOpt,
    VerifyOpt,
)
from capa_export.cli.results import print_json

__all__ = ["run"]


def run(
    bundle: BundleArg,
    prompt: Annotated[str | None, typer.Option(help="The question.", rich_help_panel=QUESTIONS)] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture; may be given several times, or not at all.", rich_help_panel=QUESTIONS),
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="A video: a file, or a folder of frames.", rich_help_panel=QUESTIONS)
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second to take from a file; those of a folder [default: 2].", rich_help_panel=QUESTIONS
        ),
    ] = None,
    messages: Annotated[
        list[Path] | None,
        typer.Option(
            help="A conversation in JSON, as chat templates take it, in place of all these; several are one batch.",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Fraction of visual tokens removed [default: the bundle's].", rich_help_panel=PRUNING),
    ] = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Take the likeliest token, whatever generation_config.json says.",
            rich_help_panel=GENERATION,
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample at this temperature [default: as generation_config.json says].", rich_help_panel=GENERATION
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this share.", rich_help_panel=GENERATION)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from so many of the likeliest tokens; 0: all.", rich_help_panel=GENERATION),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1: say again less of what was said [default: generation_config.json's].",
            rich_help_panel=GENERATION,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of what is sampled: the same seed, the same answer.", rich_help_panel=GENERATION)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer [default: generation_config.json's, or 64].", rich_help_panel=GENERATION),
    ] = None,
    engine: EngineOpt = None,
    provider: ProviderOpt = "cpu",
    verify: VerifyOpt = False,
    verify_key: VerifyKeyOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Answer a question about pictures, from the bundle alone."""
    from capa_export.api.bundle import Bundle
    from capa_export.data.conversation import conversations
    from capa_export.model.generation import GenerationOptions
    from capa_export.run.answer import run_to_end

    # What a model says is for whoever asked, byte for byte where that is a program.
    shown = harmless if sys.stdout.isatty() else str

    def stream(text: str) -> None:
        print(shown(text), end="", flush=True)

    options = GenerationOptions(
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    opened = Bundle(bundle, verify_key=verify_key)
    began = time.perf_counter()
    asked = conversations(prompt, image or [], video, fps, messages or [])
    opening = {"pictures_ms": round(1e3 * (time.perf_counter() - began), 3)}
    several = len(asked) > 1
    loaded = opened.load(
        engine=engine,
        provider=provider,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        trust_remote_code=trust_remote_code,
        verify=verify,
    )
    told = None if as_json or several else stream
    results = [opening | result for result in run_to_end(loaded.answers(asked, ratio=ratio, options=options), told)]
    if as_json:
        print_json(results if several else results[0])
        return
    for result in results:
        # Before what stderr says, where both go to one place.
        print(shown(str(result["answer"])) if several else "", flush=True)
        _say_cost(result)


def _say_cost(result: dict[str, Any]) -> None:
    kept = ", ".join(
        f"kept {stage['kept']} of {stage['visual']} visual tokens {stage['where']}" for stage in result["stages"]
    )
    pictures, per_token = result["pictures_ms"], result["decode_ms_per_token"]
    parts = ", ".join(f"{part} {result[f'{part}_ms']:.0f}" for part in ("pictures", "processor", "vision", "prefill"))
    decode = f" ({per_token:.1f} a token)" if per_token is not None else ""
    sampled = f"; sampled with --seed {seed}" if (seed := result["generation"].get("seed")) is not None else ""
    print(
        f"{kept}; first token after {pictures + result['first_token_ms']:.0f} ms ({parts}), "
        f"whole answer after {pictures + result['answer_ms']:.0f} ms{decode}{sampled}",
        file=sys.stderr,
    )
