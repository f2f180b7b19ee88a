# SPDX-License-Identifier: Apache-2.0
"""What the demo asks: a question about a text that is longer than the 16-bit windows, so that 2-bit pages are read."""

from typing import Any

TEXT = """\
Notes of the harbour office, read to the new keeper of the lighthouse on his first evening.

The lighthouse of Port Alder stands on a granite rock at the mouth of the bay. It was built by the engineer Maria \
Lindqvist, who had built two bridges before and no lighthouse, and who said that a tower is a bridge that goes up. \
The work took six years. In the first winter a storm carried away the wooden crane, and the masons spent the spring \
pulling their own stones out of the water. The tower is forty metres high and has two hundred and twelve steps, which \
every keeper learns to count in the dark. The walls are three metres thick at the foot and less than one at the top.

The first lamp burned whale oil and had to be filled every four hours. Later came paraffin, which was brighter and \
smelled worse, and then electricity, which came over from the town by a cable on the sea floor. The lens is older \
than the lamp in it. It was ground in France from more than a thousand pieces of glass, floats on a bath of mercury, \
and is so well balanced that a child can turn it with one finger, although it weighs as much as a carriage with four \
horses.

Every light on the coast has a rhythm of its own, so that sailors know which one they see. Port Alder gives two short \
flashes and a long one, and then is dark for ten seconds. In fog the light is of no use, and the keeper starts the \
horn instead. The horn can be heard nine miles out on a quiet day. The people in the village say that they no longer \
hear it, but that they wake up when it stops.

The keepers lived in the tower with their families until the road was built. They grew potatoes in a garden the size \
of a table, on soil that had been brought by boat, and kept a goat named Admiral, who was afraid of the sea. The \
children went to school by boat when the weather let them, and learned to read from the log book when it did not. The \
log book is still kept. On most days it says only: wind, sea, nothing to report. On one page, a century old, somebody \
has added below these words: a whale came by and looked at us for a long time.

Today a small computer turns the light on and off, and a keeper comes once a week to clean the glass. He is told \
three things on his first evening. Never touch the mercury. Never count the steps aloud, it brings fog. And never \
leave without looking once at the light from the boat, as the sailors do, because that is the side it was made for.
"""

QUESTION = "What does this text describe, and who built it? Answer in two or three sentences."

MESSAGES: list[Any] = [{"role": "user", "content": f"{TEXT}\n{QUESTION}"}]
