"""Exporting models: ONNX, torch.export, OpenVINO, semi-structured weights; every export is compared with the model."""
