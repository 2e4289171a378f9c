"""Base models, files of settings, flags and folders that a run cannot begin with."""

from wrong_inputs import (
    GPT2_OF_64_POSITIONS,
    ROWS,
    World,
    Wrong,
    adapter_json,
    base,
    cut,
    environment,
    not_installed,
    other_model,
    resume,
    settings,
    train,
    weights_of_another_shape,
)

MODEL = {
    "base_missing": train("--base_model ./nowhere", "base_model './nowhere' is not a folder; name one that holds"),
    "base_offline": train("--base_model nobody/nothing", "base_model 'nobody/nothing'"),
    "base_no_name": train("--base_model 'my model'", "base_model 'my model'"),
    "base_file": train("--base_model {data}", "base_model '.*' is a file; name the folder"),
    "base_file_here": train(
        "--base_model model.safetensors",
        "base_model 'model.safetensors' is a file; name the folder",
        lambda world: world.text("model.safetensors", "x"),
    ),
    "base_empty_folder": base("folder without config.json", lambda world: (world.here / "base").mkdir()),
    "base_adapter": train(
        "--base_model {here}/run", r"so not a model \(it holds an adapter: name the base model\)", World.run
    ),
    "base_without_tokenizer": base(
        "no tokenizer can be loaded from base_model .* it has no tokenizer.json",
        lambda world: [file.unlink() for file in world.base().glob("tokenizer*")],
    ),
    "base_tokenizer_damaged": base(
        "no tokenizer can be loaded from base_model .* one of its .json files is damaged",
        lambda world: (world.base(), cut("base/tokenizer.json", 99)(world)),
    ),
    "base_tokenizer_no_json_object": base(
        "no tokenizer can be loaded from base_model .*do not hold what transformers looks for",
        lambda world: (world.base(), world.text("base/tokenizer_config.json", "[]")),
    ),
    "base_encoder": base(
        "BertModel lets a token see the ones after it, as an encoder does",
        other_model(
            "BertModel",
            vocab_size=400,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
        ),
    ),
    "base_encoder_decoder": base(
        "base_model '.*' cannot be loaded as a causal LM",
        other_model("T5Model", vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    ),
    "base_config_no_json": base(
        "base/config.json' is not a valid JSON file", lambda world: (world.base(), world.text("base/config.json", "{"))
    ),
    "base_config_of_unknown_type": base("model type `zzz`", lambda world: world.base(config={"model_type": "zzz"})),
    "base_config_with_code_of_its_own": base(
        "runs no code",
        lambda world: world.base(
            config={"model_type": "zzz", "auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.M"}}
        ),
    ),
    "base_without_weights": base(
        "cannot be loaded as a causal LM.*model.safetensors",
        lambda world: (world.base() / "model.safetensors").unlink(),
    ),
    "base_weights_damaged": base(
        "cannot be loaded as a causal LM: one of its .safetensors files is damaged",
        lambda world: (world.base(), cut("base/model.safetensors", 5000)(world)),
    ),
    "base_weights_empty": base(
        "cannot be loaded as a causal LM: one of its .safetensors files is damaged",
        lambda world: (world.base(), cut("base/model.safetensors", 0)(world)),
    ),
    "base_weights_of_another_shape": base("not of the shapes that its config.json asks for", weights_of_another_shape),
    "base_fewer_tokens_than_its_tokenizer": base(
        "holds token .*, but .* has embeddings for 100",
        other_model(
            "LlamaForCausalLM",
            vocab_size=100,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ),
    "base_fewer_positions_than_a_packed_row": base(
        r"a row has 128 tokens, and model .* has 64 positions; --max_length can be 64", GPT2_OF_64_POSITIONS
    ),
    "base_fewer_positions_than_a_document": base(
        "positions; --max_length can be 64 at most", GPT2_OF_64_POSITIONS, "--packing none"
    ),
    "tokenizer_without_eos": base("has no EOS token", lambda world: world.base(tokenizer_config={"eos_token": None})),
    "tokenizer_without_bos": base(
        "bos='yes' needs a tokenizer with a BOS token",
        lambda world: world.base(tokenizer_config={"bos_token": None}),
        "--bos yes",
    ),
    "dtype_float16": train("--dtype float16", "--dtype takes auto or float32 or bfloat16, not 'float16'"),
    "dtype_misspelt": train("--dtype bfloat61", "Did you mean bfloat16"),
    "layer_zero": train("--target_layer 0", "--target_layer must be at least 1, not 0"),
    "layer_too_large": train("--target_layer 20", "target_layer is 20, but the model has 2 layers"),
    "layer_negative": train("--target_layer -1", "--target_layer must be at least 1, not -1"),
    "layer_word": train("--target_layer last", "--target_layer takes an integer, not 'last'"),
    "bottleneck_zero": train("--bottleneck_dim 0", "--bottleneck_dim must be at least 1, not 0"),
    "rate_target_without_kl": train("--ib_rate_target 5 --kl_weight 0", "ib_rate_target 5 needs kl_weight above 0"),
    "rate_target_free_bits": train("--ib_rate_target 5 --free_bits 2", "ib_rate_target 5 and free_bits 2 exclude each"),
    "encoder_rank_alone": train("--encoder_rank 4", "--encoder_rank 4 needs --encoder lora"),
    "rank_zero": train("--lora_r 0", "--lora_r must be at least 1, not 0"),
    "rank_fraction": train("--lora_r 2.5", "--lora_r takes an integer, not '2.5'"),
    "dropout_one": train("--lora_dropout 1", "--lora_dropout must be at least 0 and below 1, not 1.0"),
    "modules_that_match_nothing": train("--lora_target_modules query value", "query.*not found in the base model"),
    "modules_that_cannot_be_adapted": train("--lora_target_modules input_layernorm", "adapter does not fit"),
    "modules_with_the_head": train("--lora_target_modules q_proj,lm_head", "the output head is a .*take it out"),
    "modules_and_all": train("--lora_target_modules all-linear q_proj", "all-linear or module names, not both"),
    "modules_none": train("--lora_target_modules none", "must name at least one module"),
    "flash_attention_on_the_cpu": train(
        "--attn_implementation flash_attention_2", "needs a GPU; with --use_cpu take auto"
    ),
    "attention_unknown": train("--attn_implementation flash", "--attn_implementation takes auto or flash_attention_3"),
    "liger_on_the_cpu": train("--liger", "--liger needs a GPU"),
    "bitsandbytes_missing": train(
        "--load_in_4bit",
        r"--load_in_4bit needs bitsandbytes, which is not installed: pip install \"ibft\[quantized\]\"",
        lambda world: world.monkeypatch.setattr("ibft.loading.version", not_installed),
    ),
    "peak_of_nothing": train("--peak_tflops 0", "--peak_tflops must be greater than 0, not 0"),
}

FILES = {
    "adapter_config_missing": train("--adapter_config {here}/a.json", "a.json cannot be read: No such file"),
    "adapter_config_no_json": settings("adapter_config", "a.json", '{"r": 2,}', "a.json is not valid JSON: .* line 1"),
    "adapter_config_list": settings("adapter_config", "a.json", "[]", r"must hold a JSON object {...}, not \[\]"),
    "adapter_config_unknown_key": settings(
        "adapter_config", "a.json", adapter_json(lora_dropuot=0.1), r"lora_dropuot .*Did you mean lora_dropout"
    ),
    "adapter_config_of_another_kind": settings(
        "adapter_config", "a.json", adapter_json(peft_type="IA3"), "peft_type must be \"LORA\", not 'IA3'"
    ),
    "adapter_config_rank_text": settings("adapter_config", "a.json", adapter_json(r="two"), "a.json: .*--?lora_r"),
    "adapter_config_rank_zero": settings("adapter_config", "a.json", adapter_json(r=0), "a.json: .*must be at least 1"),
    "adapter_config_modules_no_names": settings(
        "adapter_config", "a.json", adapter_json(target_modules=["q_proj", 3]), "a.json: target_modules takes names"
    ),
    "adapter_config_modules_no_expression": settings(
        "adapter_config", "a.json", adapter_json(target_modules="(("), r"a.json: .*does not fit.*missing \)"
    ),
    "adapter_config_ranks_no_numbers": settings(
        "adapter_config", "a.json", adapter_json(rank_pattern={"q_proj": "a"}), "a.json: .*does not fit.*TypeError"
    ),
    "adapter_config_token_out_of_range": settings(
        "adapter_config", "a.json", adapter_json(trainable_token_indices=[9999]), "a.json: .*does not fit.*index 9999"
    ),
    "adapter_config_layers_out_of_range": settings(
        "adapter_config", "a.json", adapter_json(layers_to_transform=[9]), "adapter does not fit the base model"
    ),
    "adapter_config_above_the_bottleneck": settings(
        "adapter_config",
        "a.json",
        adapter_json(layers_to_transform=[1]),
        "no adapter is at or below target_layer 1",
        "--target_layer 1",
    ),
    "adapter_config_and_flag": settings(
        "adapter_config", "a.json", adapter_json(), "--lora_r and --adapter_config .* give one", "--lora_r 8"
    ),
    "training_config_misspelt": settings(
        "training_config",
        "t.json",
        '{"learning_rat": 1e-4}',
        "'learning_rat' is not a field .*Did you mean learning_rate",
    ),
    "training_config_trailing_comma": settings(
        "training_config", "t.json", '{\n"seed": 1,\n}', "t.json is not valid JSON: .* at line [23]"
    ),
    "training_config_type": settings(
        "training_config", "t.json", '{"seed": "1"}', 't.json: seed takes an integer, not "1"'
    ),
    "training_config_unsupported": settings(
        "training_config", "t.json", '{"neftune_noise_alpha": 5}', "neftune_noise_alpha is 5, which .* does not support"
    ),
    "training_config_folder": train("--training_config {here}", "cannot be read: Is a directory"),
    "training_config_latin1": train(
        "--training_config {here}/t.json",
        "t.json cannot be read: it is not UTF-8 text",
        lambda world: world.text("t.json", b'{"run_name": "caf\xe9"}'),
    ),
    "config_missing": train("--config {here}/run.yaml", "run.yaml cannot be read: No such file"),
    "config_tab": settings("config", "run.yaml", "seed:\t1\n\tmax_steps: 2\n", "not valid YAML: .*line"),
    "config_unknown_key": settings("config", "run.yaml", "sede: 1\n", "'sede' is not an option. Did you mean seed"),
    "config_key_twice": settings("config", "run.yaml", "seed: 1\nseed: 2\n", "gives seed twice"),
    "config_list": settings("config", "run.yaml", "- seed\n", "must hold a mapping"),
    "config_type": settings(
        "config", "run.yaml", "weight_decay: much\n", "weight_decay takes a finite number, not 'much'"
    ),
    "config_of_another_ending": settings("config", "run.toml", "seed = 1", "--config takes a .yaml, .yml or .json"),
}

FLAGS = {
    "flag_misspelt": train("--learning-rat 1e-4", "--learning_rat is not an option .*Did you mean --learning_rate"),
    "flag_shortened": train("--learn 1e-4", "--learn is not an option"),
    "flag_without_value": train("--seed", "--seed: expected one argument"),
    "flag_with_a_dash_of_a_word_processor": train("—seed 1", "'—seed' begins with a long dash, .*write --name"),
    "value_without_flag": train("7", "'7' has no flag before it"),
    "switch_with_value": train(
        "--gradient_checkpointing true", "'true' has no flag before it: a switch takes no value"
    ),
    "required_missing": Wrong("train --output_dir {out}", "--base_model and --dataset must be given"),
    "learning_rate_negative": train("--learning_rate -1e-4", "--learning_rate must be greater than 0, not -0.0001"),
    "learning_rate_zero": train("--learning_rate 0", "--learning_rate must be greater than 0"),
    "learning_rate_nan": train("--learning_rate nan", "--learning_rate takes a finite number, not nan"),
    "learning_rate_comma": train("--learning_rate 1,5", "--learning_rate takes a finite number, not '1,5'"),
    "alpha_negative": train("--alpha -1", "--alpha must be at least 0, not -1.0"),
    "warmup_ratio": train("--warmup_ratio 2", "--warmup_ratio must be between 0 and 1, not 2.0"),
    "max_steps_zero": train("--max_steps 0", "--max_steps must be at least 1, or -1 for no limit"),
    "epochs_zero": train("--num_train_epochs 0", "--num_train_epochs must be greater than 0"),
    "seed_negative": train("--seed -1", "--seed must be between 0 and"),
    "save_steps_zero": train("--save_steps 0", "--save_steps must be at least 1, not 0"),
    "scheduler_ends_higher": train(
        "--lr_scheduler_type polynomial --learning_rate 1e-7", "ends at a learning rate of 1e-07, so --learning_rate"
    ),
    "scheduler_unknown": train("--lr_scheduler_type cosin", "Did you mean cosine"),
    "preset_unknown": train("--preset publishd", "--preset takes published, not 'publishd'"),
    "tokens_per_batch": train("--tokens_per_batch 1000", "must be a multiple of --max_length .128., not 1000"),
    "batch_twice": train("--tokens_per_batch 256 --per_device_train_batch_size 2", "set the same thing; give one"),
    "num_proc_zero": train("--num_proc 0", "--num_proc must be at least 1, not 0"),
    "tracker_unknown": train("--report_to wand", "not 'wand'. Did you mean wandb"),
    "deepspeed_and_fsdp2": train(
        "--use_deepspeed --engine fsdp2", "--use_deepspeed and --engine fsdp2 name two engines"
    ),
    "deepspeed_config_without_deepspeed": train(
        "--deepspeed_config ds.json", "--deepspeed_config ds.json needs --engine deepspeed; the engine is auto"
    ),
    "deepspeed_config_missing": train("--use_deepspeed --deepspeed_config nowhere.json", "nowhere.json"),
    "engine_unknown": train(
        "--engine fsdp", "--engine takes auto or ddp or fsdp2 or deepspeed, not 'fsdp'. Did you mean"
    ),
    "ddp_in_one_process": train("--engine ddp", "--engine ddp spreads a run over processes.*torchrun --nproc_per_node"),
    "fsdp2_in_one_process": train("--engine fsdp2", "--engine fsdp2 spreads a run over processes.*torchrun"),
    "world_size_word": train("", "WORLD_SIZE is 'two'; torchrun sets it, to a number", environment(WORLD_SIZE="two")),
    "world_size_zero": train("", "WORLD_SIZE is '0'; .* at least 1", environment(WORLD_SIZE="0")),
    "world_size_without_torchrun": train(
        "", "WORLD_SIZE is 2, but RANK is not set.*torchrun", environment(WORLD_SIZE="2")
    ),
    "local_rank_word": train("", "LOCAL_RANK is 'x'", environment(LOCAL_RANK="x")),
    "command_unknown": Wrong(
        "trian",
        "'trian' is not a command of ibft; there are: train, eval, estimate, memorization, represent, export, lab",
    ),
}

FOLDERS = {
    "output_file": train("--output_dir {here}/x", "output_dir .*/x is a file", lambda world: world.text("x", "mine")),
    "output_below_a_file": train(
        "--output_dir {here}/x/run",
        "output_dir .*/x/run cannot be written to: Not a directory",
        lambda world: world.text("x", "mine"),
    ),
    "output_below_a_file_dry": train(
        "--dry_run --output_dir {here}/x/run",
        "cannot be written to: Not a directory",
        lambda world: world.text("x", "mine"),
    ),
    "output_name_too_long": train("--output_dir {here}/" + "x" * 300, "cannot be written to: File name too long"),
    "output_empty_name": train("--output_dir ''", "--output_dir must be a name or path"),
    "output_in_the_dataset": train(
        "--dataset {here}/rows --output_dir {here}/rows/runs/first",
        "output_dir .*/first lies in the dataset '.*/rows', whose files are all read as data",
        lambda world: world.rows("rows/a.jsonl", *ROWS),
    ),
    "output_in_the_validation_dataset": train(
        "--validation_dataset {here}/rows --output_dir {here}/rows",
        "output_dir .*/rows lies in the dataset",
        lambda world: world.rows("rows/a.jsonl", *ROWS),
    ),
    "output_holds_a_model": train("--output_dir {here}/base", "holds a model", World.base),
    "output_holds_a_run": train("--output_dir {here}/run", "holds a finished run; .*--overwrite", World.run),
    "output_holds_half_a_run": train(
        "--output_dir {here}/run", "holds an unfinished run; pass --resume", lambda world: world.run(finished=False)
    ),
    "output_holds_another_adapter": train(
        "--output_dir {here}/a", "holds another adapter", lambda world: world.json("a/adapter_config.json", {})
    ),
    "resume_nothing": train("--resume", "there is no checkpoint in .* to continue from"),
    "resume_a_finished_run": train("--output_dir {here}/run --resume", "holds a finished run", World.run),
    "resume_and_overwrite": resume("--overwrite", "--resume and --overwrite exclude each other"),
    "resume_another_seed": resume("--seed 5", "is of a different run; .*seed was 42, is 5"),
    "resume_another_dataset": resume(
        "--dataset {here}/rows.jsonl",
        "different run; .*data was one of fingerprint [0-9a-f]{12}, is one of",
        lambda world: world.rows("rows.jsonl", *ROWS),
    ),
    "resume_a_damaged_state": resume(
        "", "checkpoint-2/state.pt is damaged: it is not what was", cut("run/checkpoint-2/state.pt", 99)
    ),
    "resume_a_damaged_adapter": resume(
        "", "adapter_model.safetensors is damaged: it is not", cut("run/checkpoint-2/adapter_model.safetensors", 99)
    ),
    "resume_a_checkpoint_without_its_bottleneck": resume(
        "",
        "ib_head.safetensors cannot be read: No such file.*Remove that checkpoint to continue from the one before",
        lambda world: (world.here / "run/checkpoint-2/ib_head.safetensors").unlink(),
    ),
}
