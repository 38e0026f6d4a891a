"""Tune the built-in model on a file, look at what it gained, and ask it something.

python examples/tune.py data.jsonl
"""

import sys

import headstart

run = headstart.tune(sys.argv[1])

difference = run.result["difference"]
print(run.result["verdict"])
print(
    f"{difference['metric']}: {difference['value']:+.3f}, 95% interval {difference['low']:+.3f} to {difference['high']:+.3f}"
)
print("report:", run.report)

model, tokenizer = headstart.load(str(run.path))
messages = [{"role": "user", "content": "What is the plan?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=run.result["stop_ids"])
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
