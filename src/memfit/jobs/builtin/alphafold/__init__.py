"""AlphaFold 2 (Jumper et al. 2021), written from the algorithms of its supplement."""
