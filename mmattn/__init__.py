from mmattn.attention import draw_shift, random_shift_attention
