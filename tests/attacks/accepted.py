"""What is taken although somebody meant harm, and why that is right."""

__all__ = ["ACCEPTED"]

ACCEPTED: dict[str, str] = {
    "export: vision num_heads 8": "no weight says how many heads there are",
    "plan: vision num_heads 8": "no weight says how many heads there are",
    "plan: processor image_mean [0.5, 0.5, 0.5, 0.5,": "a plan looks at no colours",
    "a folder for model.safetensors.index.json": "the weights are in one file, which needs no index",
    "a folder for adapter_config.json": "it is no adapter's config",
    "a folder for preprocessor_config.json, planned": "transformers' own settings hold where there is no file",
    "a folder for .verified.json of a bundle": "a cache that cannot be read is done without",
    "a huge picture": "numbers alone are multiplied",
    "do_center_crop True": "this kind of processor crops nothing",
    "do_resize False": "a picture that fits is left as it is",
    "a million names": "tensors without elements take no memory, and no graph reads them",
    "a GIF of 100,000 frames": "the first is shown",
    "an answer without an end": "its context ends it",
    "a temperature of nothing": "the likeliest token",
    "a huge n-gram": "nothing is ever repeated that long",
    "1e-320 for --temperature": "the likeliest token",
    f"{10**30} for --top-k": "every token",
    "1e308 for --repetition-penalty": "nothing is said twice",
    f"{10**400} for --seed": "a seed may be any number",
    f"{10**30} for --max-pixels": "a picture is never enlarged to its most",
    f"{10**30} for --min-keep-per-image": "every visual token stays",
    f"{10**30} for --limit": "every row",
}
