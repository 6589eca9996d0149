"""The parts of `train.export`: device formats and model cards."""
