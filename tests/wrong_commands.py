"""What is wrong of an export or a lab."""

import json

from wrong_inputs import Wrong, cut, export, other_model

EXPORT = {
    "export_nothing": Wrong("export --output_dir {out}", "--adapter must be given"),
    "export_missing": Wrong("export --adapter {here}/rnu --output_dir {out}", "--adapter '.*/rnu' is not a folder"),
    "export_file": Wrong("export --adapter {data} --output_dir {out}", "is not a folder; name the output_dir of a run"),
    "export_base_model": Wrong(
        "export --adapter {base} --output_dir {out}", "holds no adapter_config.json, so it is no"
    ),
    "export_unfinished": export(
        "",
        "The run has not finished; its checkpoints are checkpoint-2",
        lambda world: (world.here / "run/adapter_model.safetensors").unlink(),
    ),
    "export_damaged_weights": export(
        "", "adapter_model.safetensors cannot be read", cut("run/adapter_model.safetensors", 99)
    ),
    "export_damaged_config": export("", "adapter_config.json is not valid JSON", cut("run/adapter_config.json", 9)),
    "export_prompt_tuning": export(
        "", "peft_type is 'IA3'; only LORA", lambda world: world.json("run/adapter_config.json", {"peft_type": "IA3"})
    ),
    "export_damaged_record": export("", "ibft.json is not valid JSON", cut("run/ibft.json", 9)),
    "export_record_of_another_tool": export(
        "", "ibft.json is no record of `ibft train`", lambda world: world.json("run/ibft.json", {"config": 5})
    ),
    "export_into_itself": export("--output_dir {here}/run", "is or holds .*/run, which is needed"),
    "export_into_a_full_folder": export(
        "--output_dir {here}/full", "is not empty; choose another", lambda world: world.text("full/mine.txt", "")
    ),
    "export_over_what_is_not_ours": export(
        "--output_dir {here}/full --overwrite", "did not write", lambda world: world.text("full/mine.txt", "")
    ),
    "export_into_a_file": export("--output_dir {here}/x", "is a file", lambda world: world.text("x", "")),
    "export_below_a_file": export(
        "--output_dir {here}/x/y",
        "output_dir .*/x/y cannot be written: Not a directory",
        lambda world: world.text("x", ""),
    ),
    "export_dtype_alone": export("--dtype float16", "--dtype float16 needs --merge"),
    "export_dtype_unknown": export("--merge --dtype int8", "--dtype takes auto or float32"),
    "export_private_alone": export("--private", "--private needs --push_to_hub"),
    "export_push_without_namespace": export("--push_to_hub mine", "takes NAMESPACE/NAME"),
    "export_push_no_name": export("--push_to_hub 'me/my model'", "is no name for a repository"),
    "export_push_without_token": export("--push_to_hub me/mine", "needs a token"),
    "export_base_gone": export(
        "--merge",
        "base_model '/gone/base' is not a folder.*--base_model names another place",
        lambda world: world.json(
            "run/adapter_config.json",
            {
                **json.loads((world.here / "run/adapter_config.json").read_text()),
                "base_model_name_or_path": "/gone/base",
            },
        ),
    ),
    "export_other_base": export(
        "--merge --base_model {here}/base",
        "is not the model that the adapter was trained on",
        lambda world: world.base(config={"rms_norm_eps": 0.1}),
    ),
    "export_base_of_another_size": export(
        "--merge --allow_other_base --base_model {here}/base",
        "cannot be merged into base_model",
        other_model(
            "LlamaForCausalLM",
            vocab_size=400,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ),
    "export_flag_misspelt": export("--merg", "--merg is not an option of `ibft export`. Did you mean --merge"),
}

LAB = {
    "lab_no_mode": Wrong("lab --output_dir {out}", r"`ibft lab` takes one of --quick \(.*\) and --full"),
    "lab_both_modes": Wrong("lab --quick --full --output_dir {out}", "takes one of --quick"),
    "lab_word": Wrong("lab quick", "'quick' has no flag before it"),
    "lab_flag": Wrong("lab --quikc", "--quikc is not an option of `ibft lab`. Did you mean --quick"),
    "lab_workers_zero": Wrong("lab --quick --output_dir {out} --workers 0", "--workers must be at least 1, not 0"),
    "lab_seeds_zero": Wrong("lab --full --output_dir {out} --seeds 0", "--seeds must be at least 1, not 0"),
    "lab_seeds_of_quick": Wrong("lab --quick --output_dir {out} --seeds 2", "--seeds 2 needs --full"),
    "lab_seed_negative": Wrong("lab --quick --output_dir {out} --seed -1", "--seed must be between 0 and"),
    "lab_seed_word": Wrong("lab --quick --output_dir {out} --seed x", "--seed takes an integer, not 'x'"),
    "lab_other_plan": Wrong(
        "lab --quick --output_dir {here}/lab",
        "lab holds an experiment with other settings .mode, seeds",
        lambda world: world.json("lab/lab.json", {}),
    ),
    "lab_something_else": Wrong(
        "lab --quick --overwrite --output_dir {here}/lab",
        "lab holds results.json, which is of no experiment",
        lambda world: world.json("lab/results.json", {}),
    ),
    "lab_report_without_folder": Wrong("lab report", "`ibft lab report` takes one folder"),
    "lab_report_of_nothing": Wrong("lab report {here}/none", "none' holds no results.json"),
    "lab_output_file": Wrong(
        "lab --quick --output_dir {here}/x", "output_dir .*/x is a file", lambda world: world.text("x", "")
    ),
    "lab_output_below_a_file": Wrong(
        "lab --quick --output_dir {here}/x/y",
        "output_dir .*/x/y cannot be written to: Not a directory",
        lambda world: world.text("x", ""),
    ),
}
