"""``quantize_gated(gate, up, kind)`` and ``quantize_gated_gradients(error, gate, up, kind, partner)``: the product in
the middle of a gated MLP, and its gradients, as e4m3 codes by rows; see the reference."""
