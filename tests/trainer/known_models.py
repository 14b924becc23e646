"""Models whose behaviour is known: one with given next-token probabilities, one that rewards the share of a word."""

import torch
import transformers

from rlhf_trainer.offline.reward_model import give_pad_token

SMALL = {
    "vocab_size": 397, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@torch.no_grad()
def dice(probabilities):
    """{token: probability} -> a causal LM that draws every token from them, whatever came before."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.model.embed_tokens.weight.fill_(1.0)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    model.lm_head.weight.zero_()  # the last hidden state is all ones
    model.lm_head.weight[:, 0] = -1e4
    for token, probability in probabilities.items():
        model.lm_head.weight[token, 0] = torch.tensor(probability).log()
    return model


@torch.no_grad()
def save_word_reward_model(folder, tokenizer, word):
    """A reward model and its tokenizer: the larger the share of the token `word` in a sequence, the higher the reward.

    Token embeddings say "is it the word?" and a constant; attention is uniform, so its output at the last token is the
    mean over all tokens, and the head reads the first of the two.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, num_labels=1)).eval()
    give_pad_token(model, tokenizer)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    (word_id,) = tokenizer(word).input_ids
    embeddings = model.model.embed_tokens.weight
    embeddings.zero_()
    embeddings[:, 1] = 1.0
    embeddings[word_id, 0] = 1.0
    for projection in (attention.q_proj, attention.k_proj, mlp.down_proj):
        projection.weight.zero_()
    for projection in (attention.v_proj, attention.o_proj):
        projection.weight.copy_(torch.eye(8))
    model.score.weight.copy_(torch.eye(8)[:1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
