"""Arrays in, arrays out: quantization arithmetic, mergeable statistics, masks, error measures. numpy only."""
