"""Forward attention on Hopper's own instructions (kernels/attention_forward_hopper.cu): rule, shapes, launch."""
