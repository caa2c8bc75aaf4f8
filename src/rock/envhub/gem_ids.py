"""The 172 environment ids of gem-llm 0.1.0."""

from __future__ import annotations

_LEVELS = ("easy", "hard", "random")
GAMES = {
    "GuessTheNumber": _LEVELS, "Mastermind": _LEVELS, "Minesweeper": _LEVELS, "Wordle": _LEVELS,
    "FifteenPuzzle": _LEVELS, "Hangman": _LEVELS, "Sudoku": _LEVELS, "TowerofHanoi": _LEVELS,
    "Game2048": (*_LEVELS, "extreme-hard"), "Sokoban": _LEVELS, "Crosswords": _LEVELS, "WordSearch": _LEVELS,
}  # fmt: skip
DATASETS = (
    "math:ASDiv2K", "math:GSM8K", "math:Math12K", "math:Math8K-3to5", "math:Orz57K", "math:DeepScaleR40K",
    "math:Geometry3K", "code:CodeContest", "code:Taco8k", "code:PrimeIntellect15k", "logic:RuleTaker-d0",
    "logic:RuleTaker-d1", "logic:RuleTaker-d2", "logic:RuleTaker-d3", "logic:RuleTaker-d5", "qa:NaturalQuestions",
    "qa:HotpotQA", "eval:MATH500", "eval:AMC", "eval:OlympiadBench", "eval:Minerva", "eval:AIME24",
    "eval:CodeContest", "eval:QaOpen", "eval:2Wiki", "eval:PopQA", "eval:TriviaQA", "eval:HotpotQA",
    "eval:Bamboogle", "eval:NaturalQuestions", "eval:Musique",
)  # fmt: skip
REASONING = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "boxnet", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "circuit_logic", "codeio", "color_cube_rotation", "complex_arithmetic", "composite", "count_bits",
    "count_primes", "countdown", "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum", "dice",
    "emoji_mystery", "family_relationships", "figlet_font", "fraction_simplification", "futoshiki", "game_of_life",
    "game_of_life_halting", "gcd", "graph_color", "group_anagrams", "gsm_symbolic", "intermediate_integration",
    "isomorphic_strings", "jugs", "kakurasu", "knight_swap", "knights_knaves", "largest_island", "lcm", "leg_counting",
    "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle", "manipulate_matrix", "maze", "mini_sudoku",
    "modulo_grid", "n_queens", "needle_haystack", "number_filtering", "number_format", "number_sequence",
    "number_sorting", "palindrome_generation", "palindrome_partitioning", "polynomial_equations",
    "polynomial_multiplication", "pool_matrix", "power_function", "prime_factorization", "products",
    "propositional_logic", "puzzle24", "quantum_lock", "ransom_note", "rearc", "rectangle_count", "rotate_matrix",
    "rotten_oranges", "rubiks_cube", "rush_hour", "self_reference", "sentence_reordering", "shortest_path",
    "simple_equations", "simple_geometry", "simple_integration", "sokoban", "spell_backward", "spiral_matrix",
    "string_insertion", "string_manipulation", "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism",
    "time_intervals", "tower_of_hanoi", "tsumego", "word_ladder", "word_sequence_reversal", "word_sorting",
    "zebra_puzzles",
)  # fmt: skip
