"""Sentences that stand for planning and for execution: the two centroids of the semantic detector.

Written for this project. A planning sentence is about the solution (what to do next, whether it holds, what else to
try); an execution sentence is part of it (a calculation, a fact, a conclusion). Numbers stand as the encoder sees them.
"""

from __future__ import annotations

PLANNING = (
    "Wait, let me check that again.",
    "Hmm, that does not look right.",
    "Let me think about how to approach this problem.",
    "I should verify the result before going on.",
    "Maybe there is an easier way to do this.",
    "Let's try a different approach.",
    "First I need to understand what is being asked.",
    "Did I make a mistake somewhere?",
    "Going back, I think my earlier assumption was wrong.",
    "What if we look at it from the other side?",
    "The key idea is to use symmetry here.",
    "My plan is to solve the smaller case first and then generalize.",
    "It might be better to count the opposite cases instead.",
    "I am not sure whether this step is valid.",
    "Let me double check the units and the sign.",
    "Now I have to decide which formula to use.",
    "This seems too complicated, so let me start over.",
    "Alternatively, we could work backwards from the answer.",
    "Notice that we can simplify the problem before computing anything.",
    "Does this make sense?",
    "Before coding it, let me think about the edge cases.",
    "The next step will be to find the missing angle.",
    "Let me break this down into smaller parts.",
    "Actually, I misread the question.",
    "To be safe, I will test the answer with a small example.",
    "How can I use the fact that the triangle is isosceles?",
)

EXECUTION = (
    "The sum of 0 and 0 is 0.",
    "Substituting x = 0 into the equation gives y = 0.",
    "So the answer is 0.",
    "She has 0 apples and buys 0 more.",
    "Multiply both sides by 0 to get 0x = 0.",
    "The area of the triangle is half the base times the height.",
    "0 + 0 = 0, carry the 0.",
    "Therefore the train travels 0 miles in 0 hours.",
    "The derivative of the function is 0x + 0.",
    "There are 0 red balls and 0 blue balls in the bag.",
    "Dividing 0 by 0 leaves a remainder of 0.",
    "The total cost is 0 dollars per week.",
    "The function returns the list of sorted numbers.",
    "Each angle of the triangle measures 0 degrees.",
    "The roots of the polynomial are x = 0 and x = 0.",
    "Tens: 0 plus 0 equals 0.",
    "Hence n is even and the product is divisible by 0.",
    "He paid 0 percent of the price, which is 0 dollars.",
    "The probability of drawing a red ball is 0 over 0.",
    "Expanding the bracket, we obtain a squared plus b squared.",
    "The loop adds every element of the array to the total.",
    "By the Pythagorean theorem, the hypotenuse is 0.",
    "The final answer is \\boxed{0}.",
    "The boiling point of water is 0 degrees at sea level.",
    "There were 0 students in the class, and half of them left.",
    "The denominator becomes 0 after simplifying the fraction.",
)
