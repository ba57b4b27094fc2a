"""wav2vec 2.0 pretraining in torch: model, loss and training step. No flwr, no ray."""
