"""wav2vec 2.0 for contrastive pretraining (Baevski et al. 2020), one concept a file."""
