"""``cross_entropy_(logits, targets, scale, softcap, gradient)``: the losses of rows of logits, which are overwritten by
their gradients; see the reference."""
