"""Exporters: checkpoint to ONNX bundle; installed as mvam_fast.export."""
