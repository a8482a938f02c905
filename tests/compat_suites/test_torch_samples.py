"""PyTorch's own sample inputs of scaled_dot_product_attention, over `cuattn.compat`, where PyTorch is installed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")

from cuattn.compat import scaled_dot_product_attention  # noqa: E402


def samples():
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return list(info.sample_inputs("cpu", torch.float64))


def test_agrees_with_every_sample():
    """In float64, where both are exact to a few units in the last place; samples with dropout agree in shape."""
    count = 0
    for sample in samples():
        arrays, options = (sample.input, *sample.args), sample.kwargs
        expected = torch.nn.functional.scaled_dot_product_attention(*arrays, **options)
        dropout = {"dropout_seed": 1} if options.get("dropout_p") else {}
        out = scaled_dot_product_attention(*(x.detach() for x in arrays), **options | dropout)
        assert out.shape == tuple(expected.shape)
        if not dropout:
            np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-11, atol=1e-12, err_msg=str(options))
        count += 1
    assert count > 5
