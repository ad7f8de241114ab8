"""The training loop as published, on the models of src/reference.py.

It runs all blocks and the head of the language model, keeps every hidden state, counts padding in
the loss and computes in float32.
"""

import torch

from src import reference

LEARNING_RATE = 5e-4
WARMUP, DECAY = 0.05, 0.2  # shares of the training
UNIT_NORM_EVERY = 100  # steps between two normalisations of the decoder columns


def train(language_model, batches, sae, options, n_steps):
    """Train the reference of an SAE of src/model.py, from its weights. Yields it after each step.

    batches: (input_ids, attention_mask), both [B,S].
    """
    model = reference.reference_of(sae, options)
    decoders = [w for name, w in model.weights.items() if name.endswith("decoder.weight")]
    optimizer = torch.optim.Adam(model.weights.values(), lr=LEARNING_RATE)
    warmup_steps = max(1, round(WARMUP * n_steps))
    decay_steps = -(-n_steps // round(1 / DECAY))

    def rate(step):
        return max(0.0, min(1.0, (step + 1) / warmup_steps, (n_steps - step) / decay_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step, (input_ids, attention_mask) in enumerate(batches):
        x = standardised_states(language_model, input_ids, attention_mask, sae.sites())
        loss = sum(model.loss_terms(x, torch.arange(len(x))).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % UNIT_NORM_EVERY == 0:
            with torch.no_grad():
                for weight in decoders:
                    weight /= weight.norm(dim=0, keepdim=True)
        model.after_step((step + 1) / n_steps)
        loss.item()  # the loop logs it, and so waits for the device
        yield model


@torch.no_grad()
def standardised_states(language_model, input_ids, attention_mask, sites):
    """x of every token, padding included: [N,D] of one site, [N,L,D] of several."""
    states = language_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    hidden = states[sites[0]]
    if len(sites) > 1:
        hidden = torch.stack([states[site] for site in sites], dim=2)
    return reference.standardise(hidden.float()).flatten(0, 1)
