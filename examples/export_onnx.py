"""Export a network to ONNX, run the file in onnxruntime, and compare. Needs onnx, onnxscript and onnxruntime.

python examples/export_onnx.py --out ran_compact.onnx
python examples/export_onnx.py --tiny --out ran_compact.onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ran_ext


def main() -> None:
    """Write the file, and print the largest difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("ran_compact.onnx"))
    options = parser.parse_args()
    import onnxruntime

    torch.manual_seed(0)
    model = ran_ext.models.create_model("ran_compact", width=0.125 if options.tiny else 1.0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(str(options.out))

    session = onnxruntime.InferenceSession(str(options.out), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(logits) - model(images)).abs().max().item()
    assert difference < 1e-3, difference
    print(f"{options.out}: largest difference to PyTorch {difference:.1e}")


if __name__ == "__main__":
    main()
