"""The search for the best option of every site: what there is to choose, the front, and the proof on other samples."""
