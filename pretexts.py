"""The pretext tasks, by the names of --pretext.

A task is an nn.Module with
- `__init__(colour_strength)`;
- `uniforms`, of the class: how many random numbers an image's view takes, U;
- `inputs_per_image`: how many inputs it gives to the network, n (for pictures.py);
- `forward(images, uniforms)`: images float32 [B, 3, S, S] in 0 … 255 and uniforms
  [B, U] in [0, 1) to the inputs [B·n, 3, P, P], normalised, those of an image one
  after another;
- `make_head(dimension, non_linear)`: head g, a module from features [B, n, d] to
  embeddings [B, 128];
- if there is something to show between image and inputs, `crop_pictures(images,
  uniforms)`: [B, 3, S, S] in 0 … 1, which pictures.py draws.
"""

from jigsaw import Jigsaw
from rotation import JigsawRotation, Rotation

PRETEXTS = {
    "jigsaw": Jigsaw,
    "rotation": Rotation,
    "jigsaw-rotation": JigsawRotation,
}
