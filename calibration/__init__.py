# SPDX-License-Identifier: Apache-2.0
"""`kvcompress calibrate`: rotations, key means, clips and layer sensitivities of one model, measured on a little text.

Three streaming passes of a Hugging Face causal LM, whose attention goes through a function of ours (`tap`):
1. `statistics`: covariances of queries and of weighted values, and mean keys, per layer and KV head -> rotations.
2. `clips`: on held-back text, the error of the attention output under every clip of a grid -> the best clip.
3. `sensitivity`: how much each layer's keys depend on distant context -> budgets of token eviction.
Nothing is kept per token, so memory does not grow with the amount of text.

`text` reads or generates the text, `model` loads and vets the model, `pipeline` runs the passes, `report` shows them.
"""
