"""Opens exported folders as a stranger does: transformers alone, without this project on the path.

    python -I hf_client.py REQUEST ANSWER

REQUEST is a JSON file, {folder: {"tokens", "texts", "pieces", "chat", "save", "client"}}; torch.save writes ANSWER.
"""

import importlib.util
import json
import sys
from typing import Any

import torch

MAX_NEW_TOKENS = 8


def answers(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if request.get("client") == "rwkv7-hf":
        from rwkv7_hf import RWKV7ForCausalLM

        model, loading = RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
    else:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model.eval()
    tokens = torch.tensor([request["tokens"]])
    found: dict[str, Any] = {"names": sorted({*loading["missing_keys"], *loading["unexpected_keys"]})}
    with torch.no_grad():
        found["logits"] = model(tokens).logits[0]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    generated = model.generate(tokens, **options)
    found["generated"] = generated[0].tolist()
    if request.get("client") == "rwkv7-hf":
        model.save_pretrained(request["save"])
        return found
    found |= details(model, tokens, generated, options)
    if "texts" in request:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found["ids"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
        found["decoded"] = [tokenizer.decode(ids) for ids in found["ids"]]
        found["pieces"] = [tokenizer.decode(ids) for ids in request["pieces"]]
        found["chat"] = tokenizer.apply_chat_template(request["chat"], tokenize=False, add_generation_prompt=True)
        found["specials"] = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        tokenizer.save_pretrained(request["save"])
    if "save" in request:
        model.save_pretrained(request["save"])
    return found


@torch.no_grad()
def details(model: Any, tokens: torch.Tensor, generated: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """State, padding, beams, gradients: what only a full client of the folder's code needs."""
    cut, padding = tokens.shape[1] // 2, 3
    first = model(tokens[:, :cut], use_cache=True)
    state = getattr(first, "cache", None) or first.past_key_values
    found = {"continued": model(tokens[:, cut:], past_key_values=state).logits[0]}
    # the same row with padding before it, next to a longer one
    row = torch.cat([torch.zeros(1, padding, dtype=torch.long), tokens], 1)
    other = torch.cat([tokens, tokens[:, :padding]], 1)
    mask = torch.ones(2, row.shape[1], dtype=torch.long)
    mask[0, :padding] = 0
    batch = model.generate(torch.cat([row, other]), attention_mask=mask, **options)
    found["generated in a batch"] = batch[0, padding:].tolist()
    found["padded after"] = model(torch.cat([tokens, row[:, :padding]], 1), attention_mask=mask.flip(1)[:1]).logits[0]
    found["without cache"] = model.generate(tokens, use_cache=False, **options)[0].tolist()
    found["beams"] = tuple(model.generate(tokens, num_beams=3, **options).shape)
    found["config"] = model.config.to_dict()
    with torch.enable_grad():
        found["loss"] = model(tokens, labels=tokens).loss
        found["loss"].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model.train()
        model(tokens, labels=tokens).loss.backward()
        differences = [(p.grad - gradients[name]).abs().max() for name, p in model.named_parameters()]
        model.eval()
    return found | {"gradients": gradients, "checkpointing changes gradients by": float(max(differences))}


if __name__ == "__main__":
    assert importlib.util.find_spec("src") is None, "this project is on the path"
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    torch.save({folder: answers(folder, request) for folder, request in requests.items()}, sys.argv[2])
