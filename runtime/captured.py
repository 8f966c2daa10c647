"""A function on the GPU as one CUDA graph: its kernels are launched all at once."""

import torch

from runtime.errors import UserError, first_line

# Calls that run the function as it is, before it is captured. In the first ones, cuDNN
# tries its algorithms and the libraries allocate their workspaces, which a capture does
# not allow.
EAGER_CALLS = 3


class CapturedFunction:
    """function(*tensors) -> tensor; from the fourth call on, one launch.

    A capture records the kernels with the addresses and numbers that they use; after
    it, the function's Python code does not run again. So everything that differs
    between two calls must be in the arguments, tensors of the same shapes each time,
    and what the function keeps must be changed in place.
    """

    def __init__(self, function):
        self.function = function
        self.eager_calls_left = EAGER_CALLS
        # Autograd adds up a weight's gradients on the stream on which the weight was
        # first used. If that were the default stream, which cannot be captured, the
        # capture would fail. So the eager calls use the stream of the capture, too.
        self.stream = torch.cuda.Stream()
        self.graph = None
        self.inputs = None  # where the graph reads
        self.output = None  # where it writes

    def __call__(self, *arguments):
        if self.eager_calls_left > 0:
            self.eager_calls_left -= 1
            return self.call_eagerly(arguments)
        if self.graph is None:
            self.capture(arguments)

        for own, given in zip(self.inputs, arguments, strict=True):
            own.copy_(given)
        self.graph.replay()
        # A copy, since the next replay writes to the same memory.
        return self.output.clone()

    def call_eagerly(self, arguments):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def capture(self, arguments):
        """Record the function's kernels; none of them runs."""
        self.inputs = [given.clone() for given in arguments]
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            # Ending a failed capture raises another error, which hides the cause.
            cause = error.__context__ or error
            raise UserError(
                f"this step cannot be captured as a CUDA graph ({first_line(cause)})",
                "use --cuda-graph False",
            ) from error
