"""Datasets and conversations that cannot be trained on."""

import gzip

import pyarrow as pa
import pyarrow.parquet
from wrong_inputs import ALTERNATING, ROWS, chat, data, fill_the_disk, parquet, rows, train

DATA = {
    "dataset_misspelt": train(
        "--dataset {here}/taks.jsonl",
        "There is no file or folder '.*/taks.jsonl'. Near by there is 'tasks.jsonl'. Accepted are files ending in",
        lambda world: world.rows("tasks.jsonl", *ROWS),
    ),
    "dataset_in_no_folder": train("--dataset {here}/dta/x.jsonl", "There is no folder '.*/dta' either"),
    "dataset_pdf": data("book.pdf", b"%PDF-1.7\n\xff", "book.pdf' is not a kind of file that can be read. Accepted"),
    "dataset_pdf_renamed": data("book.jsonl", b"%PDF-1.7\n\xe2\xff", "book.jsonl.* (not UTF-8 text|not valid JSON)"),
    "dataset_excel": data("rows.xlsx", b"PK\x03\x04", "rows.xlsx' is not a kind of file that can be read"),
    "dataset_gzip_that_is_none": data("rows.jsonl.gz", "{}\n", "rows.jsonl.gz could not be read .*Not a gzipped file"),
    "dataset_gzip_cut_off": data("a.jsonl.gz", gzip.compress(b'{"instruction": "a"}' * 99)[:40], "could not be read"),
    "dataset_parquet_that_is_none": data("rows.parquet", "x" * 99, "rows.parquet could not be read as .parquet"),
    "dataset_empty_folder": train(
        "--dataset {here}/data", "folder '.*/data' holds no data", lambda world: (world.here / "data").mkdir()
    ),
    "dataset_saved_and_damaged": train(
        "--dataset {here}/data",
        "folder '.*/data' could not be read as a saved dataset",
        lambda world: world.text("data/state.json", "{"),
    ),
    "dataset_empty_file": data("rows.jsonl", "", "rows.jsonl' has no rows"),
    "dataset_blank_lines": data("rows.jsonl", "\n\n", "rows.jsonl' has no rows"),
    "dataset_empty_list": data("rows.json", "[]", "rows.json' has no rows"),
    "jsonl_trailing_comma": data(
        "rows.jsonl", '{"instruction": "a", "output": "b"},\n', "rows.jsonl, line 1 is not valid JSON: Extra data"
    ),
    "jsonl_cut_off": data("rows.jsonl", '{"instruction": "a", "outp', "line 1 is not valid JSON: Unterminated string"),
    "json_trailing_comma": data(
        "rows.json", '[\n{"instruction": "a", "output": "b"},\n]', "rows.json, line [23] is not valid JSON"
    ),
    "json_one_pretty_object": data("rows.json", '{\n "a": 1\n}', "may also be one list of objects"),
    "json_nested_too_deeply": data("rows.json", "[" * 100_000, "rows.json.* nested too deeply"),
    "jsonl_of_lists": data("rows.jsonl", '["a", "b"]\n', "line 1 holds .*, not an object with columns"),
    "csv_semicolons": data("rows.csv", "instruction;output\na;b\n", "'instruction;output'.*comma"),
    "csv_ragged": data("rows.csv", "instruction,output\na,b\na,b,c\n", "rows.csv could not be read.*[Rr]ow"),
    "csv_header_alone": data("rows.csv", "instruction,output\n", "rows.csv' has no rows"),
    "csv_latin1": data("rows.csv", "instruction,output\na,caf\xe9\n".encode("latin-1"), "rows.csv.*UTF-?8"),
    "csv_column_twice": data("rows.csv", "instruction,output,output\na,b,c\n", "rows.csv.*output"),
    "csv_of_messages": data("rows.csv", "messages\nhello\n", "CSV file are text and hold no messages"),
    "cell_number": rows({"instruction": "a", "output": 7}, r"row 1 .*column 'output' holds 7 \(int\).*must be text"),
    "cell_none": rows({"instruction": "a", "output": None}, "column 'output' holds None .*must be text"),
    "cell_list": rows({"instruction": "a", "output": ["b"]}, "column 'output' holds .*list.*must be text"),
    "cell_absent": rows({"instruction": "a"}, r"row 1 .*column 'output' holds nothing \(no such key\)"),
    "cell_number_in_parquet": train(
        "--dataset {here}/rows.parquet",
        "column 'output' holds 1 .*must be text",
        lambda world: parquet(world, pa.table({"instruction": ["a", "b"], "output": [1, 2]})),
    ),
    "cell_null_in_parquet": train(
        "--dataset {here}/rows.parquet",
        "row 1 .*column 'output' holds None",
        lambda world: parquet(world, pa.table({"instruction": ["a", "b"], "output": ["c", None]})),
    ),
    "column_near_miss": train(
        "--prompt_column Instuction --response_column output", "not 'Instuction'. Did you mean 'instruction'"
    ),
    "columns_unknown": data(
        "rows.jsonl",
        '{"question": "a", "answer": "b"}\n',
        "'question', 'answer'; among them is none of the known pairs",
    ),
    "column_alone": train("--prompt_column instruction", "--response_column is missing"),
    "column_twice": train("--prompt_column output --response_column output", "both name 'output'; they must differ"),
    "columns_of_two_kinds": data(
        "rows.jsonl", '{"messages": [], "prompt": "a", "completion": "b"}\n', "both a conversation .* and a pair"
    ),
    "responses_empty": data(
        "rows.csv", "instruction,output\na,\nb, \n", "None of the 2 rows .*2 have an empty response"
    ),
    "responses_too_long": train(
        "--max_length 4", "None of the 24 rows .*24 do not fit into max_length 4,.*Raise --max_length.$"
    ),
    "max_length_one": train("--max_length 1", "--max_length must be at least 2, not 1"),
    "split_unknown": train("--dataset_split trian", "has no split 'trian'; --dataset_split can be 'train'"),
    "split_that_the_folder_lacks": train(
        "--dataset {here}/data --dataset_split test",
        "has no split 'test'; --dataset_split can be 'train'",
        lambda world: world.rows("data/train.jsonl", *ROWS),
    ),
    "formats_mixed": train(
        "--dataset {data} {here}/chat.jsonl",
        "holds text .* conversations .*--format chat makes conversations of both",
        lambda world: world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ),
    "separators_mixed": train(
        "--dataset {data} {here}/rows.jsonl",
        "joins prompt and response with .*--separator sets one for both",
        lambda world: world.rows("rows.jsonl", {"prompt": "a", "completion": "b"}),
    ),
    "dataset_twice": train("--dataset {data} {data}", "names '.*' twice; .*--dataset_weights"),
    "weights_of_wrong_number": train("--dataset_weights 1 2", "gives 2 weights for 1 datasets; give one for each"),
    "weight_zero": train("--dataset_weights 0", "--dataset_weights must be greater than 0, not 0.0"),
    "weight_no_number": train("--dataset_weights half", r"--dataset_weights takes finite numbers, not \['half'\]"),
    "weight_too_small": train("--dataset_weights 0.001", "of weight 0.001 gives no row to train on"),
    "streaming": train("--streaming", "streaming is not supported"),
    "validation_share": train("--validation_split 1.5", "share of the rows between 0 and 1.*not '1.5'"),
    "validation_of_all": train("--validation_split 24", "holds out 24 rows, and the data has 24"),
    "validation_split_unknown": train("--validation_split dev", "has no split 'dev'; --validation_split can be"),
    "validation_split_trained_on": train("--validation_split train", "is the split that is trained on"),
    "validation_twice": train(
        "--validation_split 0.1 --validation_dataset {data}", "both say what to validate on; give one"
    ),
    "eval_steps_without_validation": train("--eval_steps 2", "--eval_steps needs data to validate on"),
    "validation_dataset_missing": train("--validation_dataset {here}/v.jsonl", "no file or folder '.*/v.jsonl'"),
    "validation_dataset_trained_on": train("--validation_dataset {data}", "is trained on; name another"),
    "validation_dataset_of_another_kind": train(
        "--validation_dataset {here}/v.jsonl",
        "a run needs one format",
        lambda world: world.rows("v.jsonl", {"prompt": "a", "completion": "b"}),
    ),
    "validation_column_near_miss": rows({**ROWS[0], "spilt": "train"}, "not the 'splt'", "--validation_column splt"),
    "validation_column_of_other_words": train(
        "--dataset {here}/rows.jsonl --validation_column split",
        "column 'split' holds 'yes'; accepted are train",
        lambda world: world.rows("rows.jsonl", {**ROWS[0], "split": "train"}, {**ROWS[1], "split": "yes"}),
    ),
    "no_room_for_the_tokens": train("", "tokens cannot be written to .*: .*TMPDIR", lambda world: fill_the_disk(500)),
    "hub_dataset_offline": train(
        "--dataset nobody/nothing", "'nobody/nothing' is no local file or folder, and .*if it is private, HF_TOKEN"
    ),
}

CHAT = {
    "chat_without_template": train(
        "--dataset {here}/chat.jsonl",
        "has no chat template, which conversations need",
        lambda world: world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ),
    "chat_format_without_template": train("--format chat", "has no chat template, which conversations need"),
    "chat_as_text": chat([{"role": "user", "content": "a"}], "which are no plain text", "--format text"),
    "chat_separator": train("--format chat --separator :", "--separator has no place in --format chat"),
    "chat_unknown_role": chat([{"role": "bot", "content": "a"}], "of the role 'bot'; the roles are system, user"),
    "chat_sharegpt_keys": chat([{"from": "human", "value": "a"}], 'one is {"role": ..., "content": ...}'),
    "chat_one_message_alone": chat({"role": "user", "content": "a"}, "a conversation is a list of messages"),
    "chat_content_number": chat([{"role": "user", "content": 5}], "content is 5; it must be text"),
    "chat_without_assistant": chat([{"role": "user", "content": "a"}], "None of the 1 rows.* no answer to learn"),
    "chat_empty_conversation": chat([], "None of the 1 rows.* no answer to learn"),
    "chat_all_masked": chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "None of the 1 rows.* no answer to learn",
    ),
    "chat_tool_calls": chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": 1}]}], "tool_calls"
    ),
    "chat_template_refuses": train(
        "--base_model {here}/base --dataset {here}/chat.jsonl",
        r"chat.jsonl, row 0 \(counted from 0\): the chat template refuses it: roles must alternate",
        lambda world: (
            world.base(tokenizer_config={"chat_template": ALTERNATING}),
            world.chat([{"role": role, "content": "a"} for role in ("user", "user", "assistant")]),
        ),
    ),
    "chat_template_broken": train(
        "--base_model {here}/base --dataset {here}/chat.jsonl",
        "chat template refuses it",
        lambda world: (
            world.base(tokenizer_config={"chat_template": "{% for m in messages %}"}),
            world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ),
    ),
}
