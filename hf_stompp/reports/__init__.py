"""What a training run logged, as series and as pictures."""
