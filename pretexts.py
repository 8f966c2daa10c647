"""The pretext tasks by the names of --pretext.

A task is a module with

    __init__(colour_strength) uniforms                        how many random numbers an
    image's view takes inputs_per_image                how many inputs it gives to the
    network (for pictures) forward(images, uniforms)       images float32 [B, 3, S, S]
    in 0 … 255 and uniforms
                                    [B, U] in [0, 1) -> [B·n, 3, P, P], normalised
    make_head(dimension, non_linear)    head g: features [B, n, d] -> [B, 128]
"""

from jigsaw import Jigsaw
from rotation import JigsawRotation, Rotation

PRETEXTS = {
    "jigsaw": Jigsaw,
    "rotation": Rotation,
    "jigsaw-rotation": JigsawRotation,
}
